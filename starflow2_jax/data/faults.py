"""Documents that cannot be read or do not fit: they are skipped and counted, and too many of them end the run."""

from collections.abc import Mapping
from dataclasses import dataclass

from starflow2_jax.errors import UserError
from starflow2_jax.fields import option

FEWEST = 100  # documents of a source, from which on the share of skipped ones is judged


@dataclass(frozen=True)
class DataFaultsConfig:
    """How many documents may be skipped before the run ends."""

    most: float = option(
        "largest share of a source's documents that may be skipped; above it the run ends",
        0.05,
        least=0,
        most=1,
    )
    strict: bool = option("end the run at the first document that cannot be read or does not fit", False)


class DataFaultsError(UserError):
    """Too many documents of a source cannot be read or do not fit. The last good checkpoint is kept."""


def judge(counts: Mapping[str, int], faults: Mapping[str, str], given_up: bool, cfg: DataFaultsConfig) -> None:
    """Raises DataFaultsError if more documents were skipped than `cfg` allows.

    counts: documents of each source ("NAME"), and skipped ones by kind of fault ("NAME/KIND"). faults: a message for
    each kind. given_up: a reader met many documents in
    a row that cannot be used, and stopped.
    """
    for name, read in counts.items():
        if "/" in name:
            continue
        kinds = {key: count for key, count in counts.items() if key.startswith(f"{name}/")}
        skipped = sum(kinds.values())
        if skipped and (cfg.strict or given_up or (read >= FEWEST and skipped > cfg.most * read)):
            worst = max(kinds, key=lambda key: kinds[key])
            limit = "data.faults.strict allows none" if cfg.strict else f"data.faults.most={cfg.most:g}"
            raise DataFaultsError(
                f"{skipped} of {read} documents of the source {name!r} cannot be used ({limit}); the first one: "
                f"{faults[worst]}"
            )
