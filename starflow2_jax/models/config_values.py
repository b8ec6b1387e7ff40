"""Dataclasses from plain values, as a config file or JSON holds them, and where two of them differ."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping

from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.models.vlm import VlmConfig, config_class

# Fields that say how a model is computed, initialised and fed, not which parameters it has.
COMPUTED = ("dtype", "remat", "kernel", "unroll", "dropout", "embedding_std", "min_pixels", "max_pixels")


def build(cls: type, values: Mapping[str, typing.Any]) -> typing.Any:
    """An instance of the dataclass `cls` from the values of its fields, nested dataclasses included.

    A field of type VlmConfig takes the dataclass of the kind that its values name. Raises ConfigError, with the place
    of the field in front, for fields or values that do not fit.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := set(values) - set(fields):
        name = min(unknown)
        close = difflib.get_close_matches(name, fields, 1, 0.0)
        raise ConfigError(f"{cls.__name__} has no field {name!r}; did you mean {close[0]!r}?")
    kwargs = {}
    for name, value in values.items():
        types = (hints[name], *typing.get_args(hints[name]))
        nested = [t for t in types if dataclasses.is_dataclass(t) or t is VlmConfig]
        if nested and value is not None:
            try:
                value = build(config_class(value) if nested[0] is VlmConfig else nested[0], value)
            except UserError as error:
                raise ConfigError(f"{name}: {error}") from None
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from None


def differences(there: typing.Any, here: typing.Any, prefix: str = "") -> list[str]:
    """The fields in which two configs describe other parameters, as "deep.layers is 6, not 8"."""
    if type(there) is not type(here):
        kinds = (getattr(cfg, "kind", type(cfg).__name__) for cfg in (there, here))
        return ["{}kind is {}, not {}".format(prefix, *kinds)]
    found = []
    for field in dataclasses.fields(there):
        a, b = getattr(there, field.name), getattr(here, field.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            found += differences(a, b, f"{prefix}{field.name}.")
        elif a != b and field.name not in COMPUTED:
            found.append(f"{prefix}{field.name} is {a}, not {b}")
    return found
