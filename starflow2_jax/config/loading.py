"""Experiments: Python files that return an ml_collections config of what differs from the schema's defaults. Here they are
loaded, overridden, filled in and checked."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.config.checks import require_consistent
from starflow2_jax.config.schema import ExperimentConfig
from starflow2_jax.errors import ConfigError
from starflow2_jax.extensions import import_file
from starflow2_jax.fields import Key, assign, build, walk
from starflow2_jax.models.pretzel import PretzelConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(
    path: str | Path, overrides: typing.Sequence[str] = (), runlocal: bool = False, chip: str | None = None
) -> ConfigDict:
    """The whole config of an experiment, locked: what its file says, then "key.sub=value" overrides, then the defaults.

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
    values = _plain(config)
    assign(ExperimentConfig, values, overrides)
    return complete(values)


def find(path: str | Path) -> Path:
    """An experiment's file: `path` itself, or that of the experiment of this package with that name ("digits_quick")."""
    found = shipped(path, EXPERIMENTS)
    if not found.is_file():
        names = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("[!_]*.py")))
        raise ConfigError(f"there is no experiment file {path}; this package has {names}")
    return found


def shipped(path: str | Path, folder: Path) -> Path:
    """`path`, or the file of this package's `folder` that it names where there is no such path."""
    inside = folder / f"{path}.py"
    return inside if inside.is_file() and not Path(path).exists() else Path(path)


def complete(values: Mapping | ConfigDict) -> ConfigDict:
    """The whole config, locked: `values` and the defaults of what they leave out. Raises ConfigError for keys and values
    that there are not, and for what cannot work together."""
    experiment = build(ExperimentConfig, _plain(values))
    require_consistent(experiment)
    return ConfigDict(dataclasses.asdict(experiment)).lock()


def described(config: ConfigDict) -> list[Key]:
    """Every key of a whole config with its help and default, groups before what they hold."""
    return list(walk(ExperimentConfig, _plain(config)))


def _plain(values) -> dict:
    """Nested dicts of their own, in place of ConfigDicts."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    return {name: _plain(value) if isinstance(value, Mapping | ConfigDict) else value for name, value in values.items()}


def pretzel(config: ConfigDict) -> PretzelConfig:
    return build(PretzelConfig, _plain(config.model), "model")
