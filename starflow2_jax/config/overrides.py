"""Overrides: keys of a config that users set on the command line, as text."""

import dataclasses
import difflib
import fnmatch
import re
import typing
from collections.abc import Iterator

from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.fields import (
    MISSING,
    abbreviated,
    group_of,
    is_optional,
    keys,
    mismatch,
    place_below,
    require_allowed,
    require_options,
    table_of,
    without_none,
)


def assign(cls: type, values: dict, overrides: typing.Sequence[str]) -> None:
    """Set keys in `values`, the nested dicts of a config of the dataclass `cls`, from overrides of the form
    "a.b.c=TEXT".

    "*" stands for all entries of a table (`stages.*.rows`). Keys that choose a variant, such as `codec.kind`, are set
    first. Raises ConfigError for an unknown key, with the most similar known one, and for text that does not fit the
    key's type.
    """
    choosing = list(_selectors(cls))
    pairs = [override.partition("=") for override in overrides]
    for key, equals, text in sorted(pairs, key=lambda pair: not any(fnmatch.fnmatchcase(pair[0], c) for c in choosing)):
        if not equals:
            raise ConfigError(f"--config.{key} needs a value: --config.{key}=VALUE")
        try:
            _assign(cls, values, key.split("."), key, text)
        except _UnknownKeyError:
            known = [k.path for k in keys(cls, values)]
            of_same_name = [path for path in known if path.split(".")[-1] == key.split(".")[-1]]
            close = difflib.get_close_matches(key, of_same_name or known, 1, 0.0)
            raise ConfigError(f"there is no config key {key!r}; did you mean {close[0]!r}?") from None
        except _GroupError:
            inside = [k.path for k in keys(cls, values) if fnmatch.fnmatchcase(k.path, f"{key}.*")]
            more = ", ..." if len(inside) > 8 else ""
            raise ConfigError(f"config key {key!r} is a group; set one of {', '.join(inside[:8])}{more}") from None


def _selectors(cls: type, path: str = "") -> Iterator[str]:
    """The paths of the keys that choose a variant."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        place = place_below(path, field.name)
        if variant := field.metadata.get("variant"):
            yield f"{place}.{'*.' if table_of(hints[field.name]) else ''}{variant.selector}"
        elif group := group_of(hints[field.name], field, None):
            yield from _selectors(group, place)


class _UnknownKeyError(Exception):
    pass


class _GroupError(Exception):
    pass


def _assign(cls: type, values: dict, names: list[str], key: str, text: str) -> None:
    """Set the key of path `names` in the group `values` of dataclass `cls`. `key`: the whole path as the user typed
    it.
    """
    require_options(cls)
    name, *rest = names
    field = next((f for f in dataclasses.fields(cls) if f.name == name), None)
    if field is None:
        raise _UnknownKeyError
    hint = typing.get_type_hints(cls)[name]
    group, table = group_of(hint, field, values.get(name)), table_of(hint)
    if group and rest:
        _assign_in(hint, _entry(values, name), field, rest, key, text)
    elif rest and isinstance(table, type) and dataclasses.is_dataclass(table):
        entries, (entry, *rest) = _entry(values, name), rest
        chosen = list(entries) if entry == "*" else [entry]
        allowed = field.metadata["choices"] or chosen
        if not chosen or not set(chosen) <= set(allowed):
            raise _UnknownKeyError
        if not rest:
            raise _GroupError
        for each in chosen:
            _assign_in(table, _entry(entries, each), field, rest, key, text)
    elif table and len(rest) == 1:
        entries = _entry(values, name)
        entries[rest[0]] = _parsed(key, table, field, text, entries.get(rest[0], MISSING))
    elif rest:
        raise _UnknownKeyError
    elif table or (group and not (is_optional(hint) and text.lower() == "none")):
        raise _GroupError
    else:
        values[name] = _parsed(key, hint, field, text, values.get(name, MISSING))


def _assign_in(hint, inner: dict, field: dataclasses.Field, rest: list[str], key: str, text: str) -> None:
    """Assign within a group: the values `inner` of a key of the type `hint`."""
    group = group_of(hint, field, inner)
    assert group is not None, "the key is no group"
    _assign(group, inner, rest, key, text)
    if (variant := field.metadata["variant"]) and rest == [variant.selector]:
        allowed = {f.name for f in dataclasses.fields(variant.choose(inner[rest[0]]))}
        for other in set(inner) - allowed:  # the experiment's values for another variant
            del inner[other]


def _entry(values: dict, name: str) -> dict:
    """The group `name` in `values`; it is created if it does not exist. Raises ConfigError if the key holds a value."""
    if values.get(name) is None:
        values[name] = {}
    if not isinstance(values[name], dict):
        raise ConfigError(f"{name} must be a group of keys, not {abbreviated(values[name])}; give a dict")
    return values[name]


def _parsed(key: str, hint: typing.Any, field: dataclasses.Field, text: str, present: object) -> object:
    """The value that a user typed as `text`, in the type `hint`. `present`: the key's value so far. Raises
    ConfigError.
    """
    try:
        value = _read(text.strip(), hint)
    except ValueError:
        raise mismatch(f"config key {key!r}", hint, field, text, present) from None
    try:
        require_allowed(key, value, field)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return value


def _read(text: str, hint: typing.Any) -> object:
    """The text as a value of type `hint`. Raises ValueError."""
    if is_optional(hint):
        return None if text.lower() == "none" else _read(text, without_none(hint))
    if hint is bool:
        return text.lower() == "true" if text.lower() in ("true", "false") else _no(text)
    if hint is int:
        return int(text) if re.fullmatch(r"[+-]?\d(_?\d)*", text) else _no(text)
    if hint is float:
        return float(text)
    if typing.get_origin(hint) is tuple:
        inside = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        parts = [part.strip() for part in inside.removesuffix(",").split(",")] if inside.strip() else []
        return tuple(_read(part, each) for part, each in zip(parts, _entries(hint, len(parts)), strict=True))
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _no(text: str) -> typing.NoReturn:
    raise ValueError(text)


def _entries(hint: typing.Any, count: int) -> tuple:
    """The types of the entries of a tuple of type `hint`. Raises ValueError if it takes another number of entries."""
    inner = typing.get_args(hint)
    return (inner[0],) * count if inner[-1] is Ellipsis else inner if len(inner) == count else _no(str(hint))


def spelled(value: object) -> str:
    """A key's value as a user types it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(spelled, value)) or "()"
    return str(value)
