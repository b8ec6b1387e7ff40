"""Loads experiments: Python files that return an ml_collections config with the values that differ from the schema's defaults.

Overrides are applied, the defaults are filled in, and the whole config is checked."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.config.checks import require_consistent
from starflow2_jax.config.evals import EVAL_OPTIONS, with_kinds
from starflow2_jax.config.overrides import assign
from starflow2_jax.config.schema import ExperimentConfig
from starflow2_jax.errors import ConfigError
from starflow2_jax.extensions import import_file
from starflow2_jax.fields import Key, build, walk
from starflow2_jax.models.pretzel import PretzelConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(
    path: str | Path, overrides: typing.Sequence[str] = (), runlocal: bool = False, chip: str | None = None
) -> ConfigDict:
    """The whole config of an experiment, locked: the values of its file, then "key.sub=value" overrides, then the defaults.

    `path`: a file with `get_config(runlocal)`, or the name of an experiment of this package. `chip`: a TPU generation, for
    experiments whose `get_config` takes it. Raises ConfigError, before any device is touched.
    """
    path = find(path)
    module = import_file(path, "experiment", ConfigError)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(runlocal); see {EXPERIMENTS} for experiments")
    arguments = {}
    if chip is not None:
        if "chip" not in inspect.signature(module.get_config).parameters:
            raise ConfigError(f"{path} is the same for all chips; leave out --chip {chip}")
        arguments["chip"] = chip
    config = module.get_config(runlocal, **arguments)
    if not isinstance(config, ConfigDict | Mapping):
        raise ConfigError(f"{path}: get_config returns {config!r}, not an ml_collections ConfigDict")
    values = _values(config, overrides)
    assign(ExperimentConfig, values, overrides)
    return complete(values)


def find(path: str | Path) -> Path:
    """An experiment's file: `path` itself, or the file of the experiment of this package with that name ("digits_quick")."""
    found = shipped(path, EXPERIMENTS)
    if not found.is_file():
        names = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("[!_]*.py")))
        raise ConfigError(f"there is no experiment file {path}; this package has {names}")
    return found


def shipped(path: str | Path, folder: Path) -> Path:
    """`path` if it exists; otherwise the file in this package's `folder` with that name."""
    inside = folder / f"{path}.py"
    return inside if inside.is_file() and not Path(path).exists() else Path(path)


def complete(values: Mapping | ConfigDict) -> ConfigDict:
    """The whole config, locked: `values`, and defaults for the keys that they leave out. Raises ConfigError for unknown keys,
    values that are not allowed, and values that do not fit together."""
    experiment = build(ExperimentConfig, _values(values))
    require_consistent(experiment)
    return ConfigDict(dataclasses.asdict(experiment)).lock()


def described(config: ConfigDict) -> list[Key]:
    """Every key of a whole config with its help and default. A group comes before its keys."""
    return list(walk(ExperimentConfig, _plain(config)))


def _values(config: Mapping | ConfigDict, overrides: typing.Sequence[str] = ()) -> dict:
    """The values of a config as nested dicts, with the kind of each evaluation, also of those that overrides begin."""
    values = _plain(config)
    if isinstance(evals := values.get("evals", {}), dict):
        begun = {override.split(".")[1]: {} for override in overrides if override.startswith("evals.")}
        values["evals"] = with_kinds({name: each for name, each in begun.items() if name in EVAL_OPTIONS} | evals)
    return values


def _plain(values) -> dict:
    """A copy as nested dicts, without ConfigDicts."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    return {name: _plain(value) if isinstance(value, Mapping | ConfigDict) else value for name, value in values.items()}


def pretzel(config: ConfigDict) -> PretzelConfig:
    return build(PretzelConfig, _plain(config.model), "model")
