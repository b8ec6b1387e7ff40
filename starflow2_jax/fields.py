"""Fields of configs: each declares a default, a line of help and the allowed values. Configs are built from values and text."""

import dataclasses
import difflib
import fnmatch
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass

from starflow2_jax.errors import ConfigError, UserError, require_one_of

LARGEST_INT = 2**31 - 1  # of JAX's integers
LARGEST_FLOAT = 3.4028234e38  # of float32
# Fields that change how a model is computed, initialised or fed, but not its parameters.
COMPUTED = ("dtype", "remat", "kernel", "unroll", "dropout", "embedding_std", "min_pixels", "max_pixels")
SHOWN = 60  # characters of a wrong value that a message shows


@dataclass(frozen=True)
class Variant:
    """A group whose class depends on one of its own keys, such as the codec's options on `kind`."""

    selector: str  # that key
    choose: Callable[[str | None], type]  # its value (None: not given) -> the dataclass; raises UserError
    all: Callable[[], Collection[type]]  # the dataclasses of all its values

    def own(self, values: Mapping) -> dict:
        """`values` without the keys that only another variant has: they are left over when the selector changes."""
        chosen = {field.name for field in dataclasses.fields(self.choose(values.get(self.selector)))}
        others = {field.name for each in self.all() for field in dataclasses.fields(each)} - chosen
        return {name: value for name, value in values.items() if name not in others}


def option(
    help: str,
    default: typing.Any = MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[str] = (),
    variant: Variant | None = None,
) -> typing.Any:
    """A dataclass field with a line of help. Bounds hold for a number and for each number of a tuple; `choices` for a
    string, for each string of a tuple and for the keys of a dict. Without a default the field must be given."""
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"help": help, "choices": choices, "variant": variant, **bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """A key of a config: its path, type, declaration, value (MISSING: not given) and default (MISSING: it has none)."""

    path: str
    type: typing.Any  # a dataclass where the key is a group of others
    field: dataclasses.Field
    value: object
    default: object

    @property
    def group(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    @property
    def help(self) -> str:
        return self.field.metadata["help"]


def check(config) -> None:
    """Raises UserError for the first field of a dataclass whose value is not allowed."""
    for field in dataclasses.fields(config):
        if field.metadata:
            require_allowed(field.name, getattr(config, field.name), field)


def require_allowed(name: str, value, field: dataclasses.Field) -> None:
    """Raises UserError if a value is outside the field's bounds or choices, or does not fit into 32 bits."""
    if isinstance(value, tuple):
        for part in value:
            require_allowed(f"each entry of {name}", part, field)
    elif isinstance(value, str):
        if choices := field.metadata["choices"]:
            require_one_of(name, value, choices)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _require_within(name, value, **{key: field.metadata[key] for key in ("least", "most", "above", "below")})


def _require_within(name: str, value: float, least, most, above, below) -> None:
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise UserError(f"{name} is a finite number that fits into 32 bits, not {value}")
    if least is not None and value < least:
        raise UserError(f"{name} is at least {least}, not {_short(value)}")
    if above is not None and value <= above:
        raise UserError(f"{name} is above {above}, not {_short(value)}")
    if below is not None and value >= below:
        raise UserError(f"{name} is below {below}, not {_short(value)}")
    if most is None and isinstance(value, int):
        most = LARGEST_INT
    if most is not None and value > most:
        raise UserError(f"{name} is at most {most}, not {_short(value)}")


def build(cls: type, values: Mapping, path: str = ""):
    """A dataclass from the values of its fields, nested dataclasses included. Lists become tuples, and integers become floats
    if the field takes floats. `path`: key of the group. Raises ConfigError that names the key and the type."""
    place = f"{path} ({cls.__name__})" if path else cls.__name__
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} is a group of keys, not {_short(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields), key=str):
        raise ConfigError(f"{place} has no field {unknown[0]!r}; did you mean {_near(unknown[0], fields)!r}?")
    hints, given = typing.get_type_hints(cls), {}
    for name, field in fields.items():
        if name in values:
            given[name] = _built(_below(path, name), hints[name], field, values[name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{place} lacks {name}, which has no default: {field.metadata.get('help', 'give it')}")
    try:
        return cls(**given)
    except UserError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _built(path: str, hint, field: dataclasses.Field, value):
    """`value` in the field's type; a group is built."""
    if value is None and _optional(hint):
        return None
    group, table = _group(hint, field, value), _table(hint)
    if group:
        variant = field.metadata.get("variant")
        return build(group, variant.own(value) if variant and isinstance(value, Mapping) else value, path)
    named = table and isinstance(value, Mapping)
    value = value if named else _fitted(value, hint)
    if not named and not _fits(value, hint):
        raise _mismatch(path, hint, field, value)
    try:
        for key in value if named and field.metadata["choices"] else ():
            require_one_of(f"each key of {path}", key, field.metadata["choices"])
        if field.metadata and not named:
            require_allowed(path, value, field)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return {key: _built(f"{path}.{key}", table, field, part) for key, part in value.items()} if named else value


def differences(there: object, here: object, prefix: str = "") -> list[str]:
    """The differences between two configs that change the parameters, such as "deep.layers is 6, not 8"."""
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


def walk(cls: type, values: Mapping, path: str = "") -> Iterator[Key]:
    """All keys of a config in the order of their declaration. In each group, plain keys come before nested groups.

    `values`: the values that are given, as nested dicts.
    """
    hints, groups = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint, value, place = hints[field.name], values.get(field.name, MISSING), _below(path, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        group, table = _group(hint, field, value), _table(hint)
        entries = value if isinstance(value, Mapping) else {}
        if table and (order := field.metadata["choices"]):
            entries = {name: entries[name] for name in order if name in entries}
        if group and (entries or not _optional(hint)):
            groups.append((Key(place, group, field, value, default), entries))
        elif table and dataclasses.is_dataclass(table):
            groups += [(Key(f"{place}.{name}", table, field, part, MISSING), part) for name, part in entries.items()]
        elif table and entries:
            yield from (Key(f"{place}.{name}", table, field, part, MISSING) for name, part in entries.items())
        else:
            yield Key(place, hint, field, value, default)
    for key, entries in groups:
        yield key
        yield from walk(key.type, entries, key.path)


def keys(cls: type, values: Mapping) -> list[Key]:
    """All keys of a config that are not groups."""
    return [key for key in walk(cls, values) if not key.group]


def spelled(value) -> str:
    """A key's value as a user types it."""
    if isinstance(value, tuple):
        return ",".join(map(spelled, value)) or "()"
    return str(value)


def assign(cls: type, values: dict, overrides: typing.Sequence[str]) -> None:
    """Apply overrides of the form "a.b.c=TEXT" to nested dicts; "*" stands for all entries of a table (`stages.*.rows`).

    Keys that choose a variant are set first. Raises ConfigError for an unknown key, with the nearest known one, and for
    text that does not fit the key's type.
    """
    choosing = set(_selectors(cls))
    pairs = [override.partition("=") for override in overrides]
    for key, equals, text in sorted(pairs, key=lambda pair: pair[0] not in choosing):
        if not equals:
            raise ConfigError(f"--config.{key} needs a value: --config.{key}=VALUE")
        try:
            _assign(cls, values, key.split("."), key, text)
        except _UnknownKeyError:
            close = difflib.get_close_matches(key, [k.path for k in keys(cls, values)], 1, 0.0)
            raise ConfigError(f"there is no config key {key!r}; did you mean {close[0]!r}?") from None
        except _GroupError:
            inside = [k.path for k in keys(cls, values) if fnmatch.fnmatchcase(k.path, f"{key}.*")]
            more = ", ..." if len(inside) > 8 else ""
            raise ConfigError(f"config key {key!r} is a group; set one of {', '.join(inside[:8])}{more}") from None


def _selectors(cls: type, path: str = "") -> Iterator[str]:
    """The keys that choose a variant."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        place = _below(path, field.name)
        if variant := field.metadata.get("variant"):
            yield f"{place}.{variant.selector}"
        elif dataclasses.is_dataclass(plain := _plain(hints[field.name])):
            yield from _selectors(plain, place)


class _UnknownKeyError(Exception):
    pass


class _GroupError(Exception):
    pass


def _assign(cls: type, values: dict, names: list[str], key: str, text: str) -> None:
    name, *rest = names
    field = next((f for f in dataclasses.fields(cls) if f.name == name), None)
    if field is None:
        raise _UnknownKeyError
    hint = typing.get_type_hints(cls)[name]
    group, table = _group(hint, field, values.get(name)), _table(hint)
    if group and rest:
        inner = _entry(values, name)
        _assign(group, inner, rest, key, text)
        if (variant := field.metadata["variant"]) and rest == [variant.selector]:
            allowed = {f.name for f in dataclasses.fields(variant.choose(inner[rest[0]]))}
            for other in set(inner) - allowed:  # the experiment's values for another variant
                del inner[other]
    elif table and rest and dataclasses.is_dataclass(table):
        entries, (entry, *rest) = _entry(values, name), rest
        chosen = list(entries) if entry == "*" else [entry]
        if not chosen or not set(chosen) <= set(field.metadata["choices"]):
            raise _UnknownKeyError
        if not rest:
            raise _GroupError
        for each in chosen:
            _assign(table, _entry(entries, each), rest, key, text)
    elif table and len(rest) == 1:
        entries = _entry(values, name)
        entries[rest[0]] = _parsed(key, table, field, text, entries.get(rest[0], MISSING))
    elif rest:
        raise _UnknownKeyError
    elif table or (group and not (_optional(hint) and text.lower() == "none")):
        raise _GroupError
    else:
        values[name] = _parsed(key, hint, field, text, values.get(name, MISSING))


def _entry(values: dict, name: str) -> dict:
    """The group `name` of nested dicts; it is created if it does not exist."""
    if values.get(name) is None:
        values[name] = {}
    if not isinstance(values[name], dict):
        raise ConfigError(f"{name} is a group of keys, not {_short(values[name])}")
    return values[name]


def _parsed(key: str, hint, field: dataclasses.Field, text: str, present):
    """The value that a user typed as `text`, in the key's type. Raises ConfigError."""
    try:
        value = _read(text.strip(), hint)
    except ValueError:
        raise _mismatch(f"config key {key!r}", hint, field, text, present) from None
    try:
        require_allowed(key, value, field)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return value


def _read(text: str, hint):
    """Raises ValueError."""
    if _optional(hint):
        return None if text.lower() == "none" else _read(text, _plain(hint))
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


def _entries(hint, count: int) -> tuple:
    """The types of a tuple's `count` entries. Raises ValueError if the tuple takes another number of entries."""
    inner = typing.get_args(hint)
    return (inner[0],) * count if inner[-1] is Ellipsis else inner if len(inner) == count else _no(str(hint))


def _fitted(value, hint):
    """`value` with tuples for lists, and floats for integers if the type has them."""
    hint = _plain(hint)
    if isinstance(value, list | tuple) and typing.get_origin(hint) is tuple:
        return tuple(_fitted(part, typing.get_args(hint)[0]) for part in value)
    small = type(value) is int and abs(value) <= LARGEST_FLOAT
    return float(value) if hint is float and (small or isinstance(value, float)) else value


def _fits(value, hint) -> bool:
    if value is None:
        return _optional(hint)
    hint = _plain(hint)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        right = isinstance(value, tuple) and (inner[-1] is Ellipsis or len(inner) == len(value))
        return right and all(_fits(part, inner[0]) for part in value)
    return type(value) is hint


def _mismatch(name: str, hint, field: dataclasses.Field, given, present=MISSING) -> ConfigError:
    plain = _plain(hint)
    kind = typing.get_origin(plain) or plain
    article = "an" if kind is int else "a"
    examples = (present, field.default, _EXAMPLES.get(kind, MISSING))
    example = next((e for e in examples if e is not MISSING and e is not None and _fits(e, plain)), None)
    such = "" if example is None else f" such as {example!r}"
    none = " or None" if _optional(hint) else ""
    return ConfigError(f"{name} takes {article} {kind.__name__}{such}{none}, not {_short(given)}")


_EXAMPLES = {int: 1, float: 0.5, bool: True, str: "text"}


def _short(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _near(name: str, names: Collection[str]) -> str:
    return difflib.get_close_matches(str(name), names, 1, 0.0)[0]


def _optional(hint) -> bool:
    return type(None) in typing.get_args(hint)


def _plain(hint):
    """X of `X | None`."""
    return next(t for t in typing.get_args(hint) if t is not type(None)) if _optional(hint) else hint


def _group(hint, field: dataclasses.Field, value) -> type | None:
    """The dataclass that a key holds, or None where it is no group."""
    if variant := field.metadata.get("variant"):
        chosen = value.get(variant.selector) if isinstance(value, Mapping) else None
        if not isinstance(chosen, str | None):
            raise ConfigError(f"{field.name}.{variant.selector} takes a str, not {_short(chosen)}")
        try:
            return variant.choose(chosen)
        except UserError as error:
            raise ConfigError(str(error)) from None
    return _plain(hint) if dataclasses.is_dataclass(_plain(hint)) else None


def _table(hint) -> typing.Any:
    """The type of the values of a dict, or None for another type."""
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
