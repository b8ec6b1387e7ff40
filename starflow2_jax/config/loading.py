"""Loads experiments. An experiment is a Python file that returns an ml_collections ConfigDict of the keys that differ
from the defaults. Loading applies overrides, fills in the defaults of the schema, and checks the whole config."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.config import checks, codec
from starflow2_jax.config.codec import CodecExperiment
from starflow2_jax.config.evals import EVAL_OPTIONS, with_kinds
from starflow2_jax.config.overrides import assign
from starflow2_jax.config.schema import Config, ExperimentConfig, RunConfig
from starflow2_jax.errors import ConfigError
from starflow2_jax.extensions import import_file
from starflow2_jax.fields import COMPUTED, Key, abbreviated, build, walk
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.models.vlm import VlmConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STARFLOW2, CODEC = "starflow2", "fae"  # the kinds of runs
PAGES: dict[str, type[RunConfig]] = {STARFLOW2: ExperimentConfig, CODEC: CodecExperiment}


def load(
    path: str | Path,
    overrides: typing.Sequence[str] = (),
    runlocal: bool = False,
    chip: str | None = None,
    kinds: typing.Collection[str] = (STARFLOW2,),
    vlm: VlmConfig | None = None,
) -> Config:
    """The whole config of an experiment, locked. Raises ConfigError. Starts no device.

    `path`: a file with a function `get_config`, which may take runlocal and chip, or the name of an experiment that
    ships with the package.
    `overrides`: texts "key.sub=value", which take precedence over the experiment. `runlocal`: ask the experiment for a
    small version of itself. `chip`: a TPU generation such as "v5p", for experiments whose `get_config` takes it.
    `kinds`: the kinds of runs that the caller can use.
    `vlm`: a vision-language model whose sizes take the place of the experiment's; how it is computed stays the
    experiment's.
    """
    path = find(path)
    module = import_file(path, "experiment", ConfigError)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(runlocal); {EXPERIMENTS} holds examples")
    config = module.get_config(**_arguments(path, inspect.signature(module.get_config), runlocal, chip))
    if not isinstance(config, ConfigDict | Mapping):
        raise ConfigError(f"{path}: get_config must return an ml_collections ConfigDict, not {abbreviated(config)}")
    values = _values(config, overrides)
    if vlm is not None:
        model = values.setdefault("model", {})
        same = model.get("vlm", {}).get("kind", vlm.kind) == vlm.kind
        model["vlm"] = _sized(model.get("vlm", {}) if same else {}, vlm)
    page = _page(values)
    if (kind := values.get("kind", STARFLOW2)) not in kinds:
        raise ConfigError(
            f"{path} is an experiment of the kind {kind!r}, which this command does not take; name an experiment "
            f"of the kind {' or '.join(kinds)}"
        )
    assign(page, values, overrides)
    return complete(values)


def _arguments(path: Path, signature: inspect.Signature, runlocal: bool, chip: str | None) -> dict:
    """The arguments for an experiment's `get_config`, which may leave out those that it has no use for."""
    takes = signature.parameters
    if chip is not None and "chip" not in takes:
        raise ConfigError(f"{path} has the same settings for all chips; leave out --chip {chip}")
    if runlocal and "runlocal" not in takes:
        raise ConfigError(
            f"{path} has no small version, because its get_config takes no runlocal; leave out --runlocal"
        )
    given = dict(runlocal=runlocal) | ({} if chip is None else dict(chip=chip))
    given = {name: value for name, value in given.items() if name in takes}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ConfigError(
            f"{path}: {error}; get_config gets runlocal and chip alone, so give its other arguments a default"
        ) from None
    return given


def _sized(values: Mapping, cfg: typing.Any) -> dict:
    """The values of a config with the sizes of `cfg`, a dataclass."""
    sizes = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            value = _sized(values.get(field.name) or {}, value)
        if field.name not in COMPUTED:
            sizes[field.name] = value
    return {**values, **sizes}


def find(path: str | Path) -> Path:
    """The file of an experiment: `path`, or the file that ships with the package if `path` is its name
    ("digits_quick").

    Raises ConfigError if there is neither.
    """
    found = shipped(path, EXPERIMENTS)
    if not found.is_file():
        names = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("[!_]*.py")))
        raise ConfigError(f"there is no experiment file {path}; give another path, or one of the names {names}")
    return found


def shipped(path: str | Path, folder: Path) -> Path:
    """The file `path` if it exists, or else the file of that name in this package's `folder`, if it exists."""
    inside = folder / f"{path}.py"
    return inside if inside.is_file() and not Path(path).exists() else Path(path)


def complete(values: Mapping | ConfigDict | Config) -> Config:
    """The whole config, locked: `values`, and the defaults of the keys that `values` leaves out.

    Raises ConfigError for unknown keys, for values that are not allowed, and for values that contradict each other.
    """
    plain = _values(values)
    experiment: typing.Any = build(_page(plain), plain)
    (codec if experiment.kind == CODEC else checks).require_consistent(experiment)
    return typing.cast(Config, ConfigDict(dataclasses.asdict(experiment)).lock())


def described(config: Config) -> list[Key]:
    """Every key of a whole config with its help and default. A group comes before its keys."""
    return list(walk(_page(config), _plain(config)))


def _page(values: typing.Any) -> type[RunConfig]:
    """The schema of a config's kind of run. Raises ConfigError."""
    kind = values.get("kind", STARFLOW2)
    if not isinstance(kind, str) or kind not in PAGES:
        raise ConfigError(
            f"kind must be one of {', '.join(PAGES)}, not {abbreviated(kind)}; name one of them in the experiment"
        )
    return PAGES[kind]


def _values(config: typing.Any, overrides: typing.Sequence[str] = ()) -> dict[str, typing.Any]:
    """The values of a config as nested dicts, with the kind of each evaluation, also of those that overrides begin."""
    values = _plain(config)
    if isinstance(evals := values.get("evals", {}), dict):
        begun = {override.split(".")[1]: {} for override in overrides if override.startswith("evals.")}
        values["evals"] = with_kinds({name: each for name, each in begun.items() if name in EVAL_OPTIONS} | evals)
    return values


def _plain(values: typing.Any) -> dict[str, typing.Any]:
    """A copy of nested ConfigDicts and mappings as nested dicts."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    return {name: _plain(value) if isinstance(value, Mapping | ConfigDict) else value for name, value in values.items()}


def pretzel(config: Config) -> PretzelConfig:
    """The sizes of the networks of a whole config. Raises ConfigError."""
    return build(PretzelConfig, _plain(config.model), "model")
