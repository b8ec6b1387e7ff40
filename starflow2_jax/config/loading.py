"""Experiments are ml_collections configs in Python files; this file loads them, overrides keys and builds what they describe."""

import ast
import difflib
import importlib.util
import inspect
import typing
from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.errors import ConfigError
from starflow2_jax.models.config_values import build, differences
from starflow2_jax.models.pretzel import PretzelConfig

__all__ = ["assign", "build", "differences", "load", "pretzel"]
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(path: str | Path, overrides: typing.Sequence[str] = (), runlocal: bool = False, **arguments) -> ConfigDict:
    """Run `get_config(runlocal, **arguments)` of an experiment file, apply "key.sub=value" overrides, lock it.

    FILE:CHIP adds the argument `chip`, for experiments that know what suits which TPU. Raises ConfigError.
    """
    path = _shipped(path)
    if not Path(path).is_file():
        path, _, chip = str(path).partition(":")
        path = _shipped(path)
        arguments |= {"chip": chip} if chip else {}
    spec = importlib.util.spec_from_file_location("experiment", path)
    if spec is None or not Path(path).is_file():
        raise ConfigError(f"there is no experiment file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "chip" in arguments and "chip" not in inspect.signature(module.get_config).parameters:
        raise ConfigError(f"{path} is the same for all chips; leave out :{arguments['chip']}")
    config = module.get_config(runlocal, **arguments).lock()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--config.{override} needs a value: --config.{override}=VALUE")
        assign(config, key, value)
    return config


def _shipped(path: str | Path) -> str | Path:
    """The experiment of this package that `path` names ("digits_quick"), or `path` where it names none."""
    found = EXPERIMENTS / f"{path}.py"
    return found if found.is_file() and not Path(path).exists() else path


def assign(config: ConfigDict, key: str, text: str) -> None:
    """Set `key` ("a.b.c") to the value that `text` spells, of the type it has now; floats take integers."""
    *parents, last = key.split(".")
    node = config
    for i, name in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or name not in node:
            raise ConfigError(f"there is no config key {key!r}; {_nearest(config, key)}")
        if i < len(parents):
            node = node[name]
    old = node[last]
    if isinstance(old, ConfigDict):
        raise ConfigError(f"config key {key!r} is a group; set one of {', '.join(f'{key}.{k}' for k in old)}")
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not _is_like(value := _widened(value, old), old):
        raise ConfigError(f"config key {key!r} takes a {type(old).__name__} such as {old!r}, not {text!r}")
    node[last] = value


def _widened(value, old):
    """Integers become floats where the old value has them."""
    if isinstance(value, tuple) and isinstance(old, tuple) and old:
        return tuple(_widened(x, old[0]) for x in value)
    return float(value) if type(value) is int and isinstance(old, float) else value


def _is_like(value, old) -> bool:
    """Whether types agree, those within a tuple included; an empty one says nothing of them."""
    if type(value) is not type(old):
        return False
    return not isinstance(old, tuple) or not old or all(_is_like(x, old[0]) for x in value)


def _nearest(config: ConfigDict, key: str) -> str:
    keys = list(_leaves(config))
    close = difflib.get_close_matches(key, keys, 1, 0.0)
    return f"did you mean {close[0]!r}?" if close else "the config is empty"


def _leaves(config: ConfigDict, prefix: str = "") -> typing.Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def pretzel(config: ConfigDict) -> PretzelConfig:
    return build(PretzelConfig, config.model)
