"""Plans every choice of rows, mesh and remat policy, and ranks those that fit."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax

from starflow2_jax.config.schema import Config
from starflow2_jax.errors import UserError
from starflow2_jax.planning.plan import Plan
from starflow2_jax.planning.report import columns
from starflow2_jax.stages import Stage

STREAMS = ("vlm", "shallow", "deep")


@dataclass
class Candidate:
    """A choice, and its plan, or the reason why there is none."""

    rows: int
    mesh: dict[str, int]
    remat: str
    plan: Plan | None = None
    failure: str = ""

    def apply(self, config: Config, stage: Stage) -> Config:
        """A locked copy of the config with this choice."""
        changed = cast(Any, config).copy_and_resolve_references().unlock()
        changed.stages[stage.name].rows = self.rows
        changed.data.groups = math.gcd(self.rows, config.data.groups)  # must divide the rows; changes no plan
        changed.mesh.update(self.mesh)
        for stream in STREAMS:
            changed.model[stream].remat = self.remat
        return changed.lock()

    def names(self) -> str:
        """The choice in words."""
        mesh = " ".join(f"{k}={v}" for k, v in self.mesh.items() if v > 1) or "one chip"
        return f"rows={self.rows} {mesh} remat={self.remat}" if self.rows else mesh


def candidates(
    chips: int,
    rows_a_chip: list[int],
    tensors: list[int],
    remats: list[str],
    sequences: Iterable[int] = (1,),
    datas: Iterable[int] = (1,),
) -> Iterator[Candidate]:
    """Every combination of the sizes; the fsdp axis gets the chips that data, sequence and tensor leave.

    rows_a_chip: rows of a batch for each chip. Mesh sizes whose product does not divide the chips make one candidate
    with the failure set and no plan.
    """
    for data, sequence, tensor in itertools.product(datas, sequences, tensors):
        mesh = dict(data=data, sequence=sequence, tensor=tensor)
        fsdp, over = divmod(chips, data * sequence * tensor)
        if over or not fsdp:
            yield Candidate(0, mesh, "", failure=f"does not divide {chips} chips")
            continue
        for each, remat in itertools.product(rows_a_chip, remats):
            yield Candidate(each * chips, mesh | dict(fsdp=fsdp), remat)


def search(
    config: Config,
    stage: Stage,
    choices: list[Candidate],
    make: Callable[[Config], Plan],
    tell: Callable[[str], None],
) -> list[Candidate]:
    """Plan every choice; returns them with the fastest first and those that failed, with their reasons, last.

    make: makes the plan of a config. tell: is called with a line about each choice when it is done.
    """
    for number, choice in enumerate(choices, 1):
        if not choice.failure:
            _plan(choice, config, stage, make)
        result = choice.failure or (f"MFU {choice.plan.mfu:.1%}" if choice.plan else "")
        tell(f"{number} of {len(choices)}: {choice.names()}: {result}")
    return sorted(choices, key=lambda c: (bool(c.failure), -c.plan.tokens_per_second if c.plan else 0))


def _plan(choice: Candidate, config: Config, stage: Stage, make: Callable[[Config], Plan]) -> None:
    """Set the plan of a choice, or the reason why there is none."""
    try:
        choice.plan = make(choice.apply(config, stage))
        if not choice.plan.fits:
            choice.failure = f"does not fit: needs {choice.plan.peak / 2**30:.1f} GiB"
    except (UserError, jax.errors.JaxRuntimeError, ValueError, TypeError, NotImplementedError) as error:
        choice.failure = f"does not compile: {str(error).splitlines()[0][:120]}"


def table(ranked: list[Candidate]) -> str:
    """The choices as a table, one line each."""
    rows = [("choice", "positions/s", "MFU", "step s", "peak GiB", "")]
    for c in ranked:
        if c.plan is None or c.failure:
            rows.append((c.names(), "-", "-", "-", "-", c.failure))
        else:
            p = c.plan
            rows.append(
                (
                    c.names(),
                    f"{p.tokens_per_second:,.0f}",
                    f"{p.mfu:.1%}",
                    f"{p.seconds:.3f}",
                    f"{p.peak / 2**30:.1f}",
                    "",
                )
            )
    return "\n".join(columns(rows))
