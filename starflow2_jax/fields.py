"""Fields of configs: each declares a default, a line of help and the allowed values. Configs are built from plain
values.
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass

from starflow2_jax.errors import ConfigError, UserError, require_one_of

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_INT = 2**31 - 1  # of JAX's integers
LARGEST_FLOAT = 3.4028234e38  # of float32
# Fields that change how a model is computed, initialised or fed, but not its parameters.
COMPUTED = ("dtype", "remat", "kernel", "unroll", "dropout", "embedding_std", "min_pixels", "max_pixels")
SHOWN = 60  # characters of a wrong value that a message shows
Group = typing.TypeVar("Group", bound="DataclassInstance")


@dataclass(frozen=True)
class Variant:
    """A group of keys whose dataclass depends on one of them, as the codec's options depend on `codec.kind`. In a table
    of groups, each group has such a key of its own."""

    selector: str  # the name of that key
    choose: Callable[[str | None], type]  # value of the key (None: not given) -> the dataclass; raises UserError
    all: Callable[[], Collection[type]]  # the dataclasses of all values of the key

    def own(self, values: Mapping) -> dict:
        """`values` without the keys that only other variants have, which remain when the selector changes."""
        chosen = {field.name for field in dataclasses.fields(self.choose(values.get(self.selector)))}
        others = {field.name for each in self.all() for field in dataclasses.fields(each)} - chosen
        return {name: value for name, value in values.items() if name not in others}


def joined(common: type, own: type) -> type:
    """A frozen dataclass with the fields of both."""
    return dataclasses.make_dataclass(own.__name__, [], bases=(own, common), frozen=True, kw_only=True)


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
    """A dataclass field with a line of help; without a default, its value must be given.

    The bounds hold for a number, and for each number in a tuple. `choices` holds for a string, for each string in a
    tuple and for the keys of a dict.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"help": help, "choices": choices, "variant": variant, **bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """A key of a config."""

    path: str  # such as "model.deep.layers"
    type: typing.Any  # the annotation of its field; the dataclass if the key is a group
    field: dataclasses.Field
    value: object  # MISSING: not given
    default: object  # MISSING: none

    @property
    def group(self) -> bool:
        """Whether the key is a group of other keys."""
        return dataclasses.is_dataclass(self.type)

    @property
    def help(self) -> str:
        """The line of help."""
        return self.field.metadata["help"]


def check(config: typing.Any) -> None:
    """Raises UserError for the first field of a dataclass whose value is not allowed."""
    for field in dataclasses.fields(config):
        if field.metadata:
            require_allowed(field.name, getattr(config, field.name), field)


def require_allowed(name: str, value: object, field: dataclasses.Field) -> None:
    """Raises UserError if a value is outside the field's bounds or choices, or is a number that does not fit into 32
    bits.

    `name`: the value's name in the message.
    """
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
        raise UserError(f"{name} must be a finite number that fits into 32 bits, not {value}")
    if least is not None and value < least:
        raise UserError(f"{name} must be at least {least}, not {abbreviated(value)}")
    if above is not None and value <= above:
        raise UserError(f"{name} must be above {above}, not {abbreviated(value)}")
    if below is not None and value >= below:
        raise UserError(f"{name} must be below {below}, not {abbreviated(value)}")
    if most is None and isinstance(value, int):
        most = LARGEST_INT
    if most is not None and value > most:
        raise UserError(f"{name} must be at most {most}, not {abbreviated(value)}")


def require_options(cls: type) -> None:
    """Raises ConfigError if a field of a config's dataclass was not made by `option`, and so has no line of help."""
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            raise ConfigError(
                f"{cls.__name__}.{field.name} has no line of help; declare it as {field.name} = option(HELP, DEFAULT), "
                f"with `option` of starflow2_jax/fields.py"
            )


def build(cls: type[Group], values: object, path: str = "") -> Group:
    """An instance of a dataclass from plain values of its fields, with nested dataclasses built from nested mappings.

    Lists become tuples, and integers become floats where the field takes floats. `path`: the group's key in the config,
    for messages. Raises ConfigError for unknown and missing keys, and for values of the wrong type or out of bounds.
    """
    place = f"{path or 'the config'} ({cls.__name__})"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be a group of keys, not {abbreviated(values)}; give a dict")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields), key=str):
        raise ConfigError(f"{place} has no field {unknown[0]!r}; did you mean {_near(unknown[0], fields)!r}?")
    hints, given = typing.get_type_hints(cls), {}
    for name, field in fields.items():
        if name in values:
            given[name] = _built(place_below(path, name), hints[name], field, values[name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{place} lacks {name}, which has no default: {field.metadata.get('help', 'give it')}")
    try:
        return cls(**given)
    except UserError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _built(path: str, hint: typing.Any, field: dataclasses.Field, value: typing.Any) -> typing.Any:
    """`value` in the type of its field; a group becomes a dataclass."""
    if value is None and is_optional(hint):
        return None
    table = table_of(hint)
    if group := group_of(hint, field, value, path):
        variant = field.metadata.get("variant")
        return build(group, variant.own(value) if variant and isinstance(value, Mapping) else value, path)
    try:
        if table and isinstance(value, Mapping):
            for key in value if field.metadata["choices"] else ():
                require_one_of(f"each key of {path}", key, field.metadata["choices"])
            return {key: _built(f"{path}.{key}", table, field, part) for key, part in value.items()}
        value = _fitted(value, hint)
        if not _fits(value, hint):
            raise mismatch(path, hint, field, value)
        if field.metadata:
            require_allowed(path, value, field)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return value


def differences(there: "DataclassInstance", here: "DataclassInstance", prefix: str = "") -> list[str]:
    """The differences between two configs that change the parameters, such as "deep.layers is 6 (there), not 8
    (here)".
    """
    if type(there) is not type(here):
        kinds = (getattr(cfg, "kind", type(cfg).__name__) for cfg in (there, here))
        return ["{}kind is {}, not {}".format(prefix, *kinds)]
    found = []
    for field in dataclasses.fields(there):
        a, b = getattr(there, field.name), getattr(here, field.name)
        if dataclasses.is_dataclass(type(a)) and dataclasses.is_dataclass(type(b)):
            found += differences(a, b, f"{prefix}{field.name}.")
        elif a != b and field.name not in COMPUTED:
            found.append(f"{prefix}{field.name} is {a}, not {b}")
    return found


def walk(cls: type, values: Mapping, path: str = "") -> Iterator[Key]:
    """All keys of a config, in the order of their declaration, but in each group plain keys come before nested groups.

    `values`: the values that are given, as nested dicts. `path`: the group's key, if `cls` is a group. Raises
    ConfigError as `require_options` does.
    """
    require_options(cls)
    hints, groups = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint, value, place = hints[field.name], values.get(field.name, MISSING), place_below(path, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        group, table = group_of(hint, field, value), table_of(hint)
        entries = value if isinstance(value, Mapping) else {}
        if table and (order := field.metadata["choices"]):
            entries = {name: entries[name] for name in order if name in entries}
        if group and (entries or not is_optional(hint)):
            groups.append((Key(place, group, field, value, default), entries))
        elif table and dataclasses.is_dataclass(table):
            groups += [
                (Key(f"{place}.{name}", group_of(table, field, part), field, part, MISSING), part)
                for name, part in entries.items()
            ]
        elif table and entries:
            yield from (Key(f"{place}.{name}", table, field, part, MISSING) for name, part in entries.items())
        else:
            yield Key(place, hint, field, value, default)
    for key, entries in groups:
        yield key
        yield from walk(key.type, entries, key.path)


def keys(cls: type, values: Mapping) -> list[Key]:
    """The keys that `walk` yields, without the groups."""
    return [key for key in walk(cls, values) if not key.group]


def _fitted(value: typing.Any, hint: typing.Any) -> typing.Any:
    """`value` with lists and single texts turned into tuples, and integers into floats, where the type `hint` has
    tuples and floats."""
    hint = without_none(hint)
    if isinstance(value, str) and hint == tuple[str, ...]:
        return (value,)
    if isinstance(value, list | tuple) and typing.get_origin(hint) is tuple:
        return tuple(_fitted(part, typing.get_args(hint)[0]) for part in value)
    if hint is float and (isinstance(value, float) or type(value) is int and abs(value) <= LARGEST_FLOAT):
        return float(value)
    return value


def _fits(value: object, hint: typing.Any) -> bool:
    if value is None:
        return is_optional(hint)
    hint = without_none(hint)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple) or (inner[-1] is not Ellipsis and len(inner) != len(value)):
            return False
        return all(_fits(part, inner[0]) for part in value)
    return type(value) is hint


def mismatch(
    name: str, hint: typing.Any, field: dataclasses.Field, given: object, present: object = MISSING
) -> ConfigError:
    """The error for a value `given` of another type than `hint`.

    The message shows an example: the value that is `present`, the default, or a value of the type.
    """
    plain = without_none(hint)
    kind = typing.get_origin(plain) or plain
    article = "an" if kind is int else "a"
    examples = (present, field.default, _EXAMPLES.get(kind, MISSING))
    example = next((e for e in examples if e is not MISSING and e is not None and _fits(e, plain)), None)
    such = "" if example is None else f" such as {example!r}"
    none = " or None" if is_optional(hint) else ""
    return ConfigError(f"{name} takes {article} {kind.__name__}{such}{none}, not {abbreviated(given)}")


_EXAMPLES = {int: 1, float: 0.5, bool: True, str: "text"}


def abbreviated(value: object) -> str:
    """A value as Python prints it, with at most SHOWN characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def place_below(path: str, name: str) -> str:
    """The path of the key `name` in the group at `path`, which is "" for a whole config."""
    return f"{path}.{name}" if path else name


def _near(name: str, names: Collection[str]) -> str:
    return difflib.get_close_matches(str(name), names, 1, 0.0)[0]


def is_optional(hint: typing.Any) -> bool:
    """Whether the type `hint` allows None."""
    return type(None) in typing.get_args(hint)


def without_none(hint: typing.Any) -> typing.Any:
    """X for `X | None`; other types stay as they are."""
    return next(t for t in typing.get_args(hint) if t is not type(None)) if is_optional(hint) else hint


def group_of(hint: typing.Any, field: dataclasses.Field, value: object, path: str = "") -> type | None:
    """The dataclass of a key that is a group, or None for another key.

    `value`: the key's value, from which a `Variant` chooses its dataclass. `path`: the key, for messages. Raises
    ConfigError if it cannot choose one.
    """
    if (variant := field.metadata.get("variant")) and not table_of(hint):
        chosen = value.get(variant.selector) if isinstance(value, Mapping) else None
        if not isinstance(chosen, str | None):
            raise ConfigError(f"{path or field.name}.{variant.selector} takes a str, not {abbreviated(chosen)}")
        try:
            return variant.choose(chosen)
        except UserError as error:
            raise ConfigError(str(error)) from None
    return without_none(hint) if dataclasses.is_dataclass(without_none(hint)) else None


def table_of(hint: typing.Any) -> typing.Any:
    """The type of the values of a dict, or None for another type."""
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
