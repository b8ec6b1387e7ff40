"""Every key of the schema, as it is declared: the rows of these tests are made from it, so that a new key is among
them.
"""

import dataclasses
import math
import re
import typing
from functools import cache

import pytest
from refused import refused

from starflow2_jax.config import loading as configs
from starflow2_jax.config.overrides import assign, spelled
from starflow2_jax.config.schema import ExperimentConfig
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import MISSING, Key, keys, walk

PAGES = ("digits_quick", "starflow2_7b_t2i")  # between them, every kind of codec and source


@cache
def page(name: str) -> dict:
    return configs.load(name).to_dict()


def plain(name: str) -> dict:
    return configs._plain(page(name))


def rows() -> list:
    """Of all keys; a table that is empty has none."""
    found = [(name, key) for name in PAGES for key in keys(ExperimentConfig, page(name)) if key.value != {}]
    return [pytest.param(name, key, id=f"{name}-{key.path}") for name, key in found]


def at(values: dict, path: str):
    for name in path.split(".") if path else ():
        values = values[name]
    return values


def parts(hint) -> tuple:
    """The type without None, and that of its entries where it is a tuple."""
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return (tuple, typing.get_args(hint)[0]) if typing.get_origin(hint) is tuple else (hint, hint)


def another(kind: type, bounds: dict, choices, value):
    """A value of the key's type, within its bounds and choices, other than `value` where there is another."""
    if kind is bool:
        return not value
    if kind is str:
        return next((c for c in choices if c != value), "another") if choices else "another text"
    low = bounds["least"] if bounds["least"] is not None else bounds["above"]
    high = bounds["most"] if bounds["most"] is not None else bounds["below"]
    if kind is int:
        return (low if low is not None else 1) + 1 if value != (low if low is not None else 1) + 1 else value + 1
    return (0.0 if low is None else float(low)) + (0.375 if high is None else (high - (low or 0)) * 0.375)


def good(key: Key) -> tuple[object, list[str]]:
    """Another value, and the ways in which a user may type it."""
    outer, kind = parts(key.type)
    meta = key.field.metadata
    one = another(kind, meta, meta["choices"], key.value[0] if outer is tuple and key.value else key.value)
    one = "digits" if re.fullmatch(r"data\.sources\.\w+\.path", key.path) else one
    one = {"model.vlm.kind": "qwen2_5_vl"}.get(key.path, one)  # rows of tables
    if outer is not tuple:
        text = str(one)
        return one, [text, f'"{text}"', f"'{text}'"] if kind is str else [text, f" {text} ", text.lower()]
    several = (one,) * (len(typing.get_args(key.type)) if ... not in typing.get_args(key.type) else 3)
    words = [repr(x) if i % 2 else str(x) for i, x in enumerate(several)]
    bare = ",".join(map(str, several))
    return several, [bare, f"({bare})", f"[{', '.join(words)}]", f"({', '.join(map(repr, several))},)"]


def bad(key: Key) -> list[str]:
    """What is no value of the key, as text."""
    outer, kind = parts(key.type)
    meta, found = key.field.metadata, []
    if kind is int:
        found = ["many", "1.5", "1e3", "", "true", "9" * 5000, str(2**31)]
    if kind is float:
        found = ["loud", "", "nan", "inf", "-inf", "1e39", "(1;)"]
    if kind is bool:
        found = ["maybe", "1", ""]
    if kind is str and meta["choices"]:
        found = ["none of these", "('x', 'y', 'z', 'w', 'v')"]
    if kind in (int, float):
        low, high = meta["least"], meta["most"]
        found += [repr(kind(low) - 1)] if low is not None else []
        found += [repr(kind(high) + 1)] if high is not None else []
        found += [repr(float(meta[name])) for name in ("above", "below") if meta[name] is not None]
    if type(None) not in typing.get_args(key.type):
        found += ["None"] if kind is not str or meta["choices"] else []
    if outer is tuple and ... not in typing.get_args(key.type):
        found += ["1", "1,2,3", "()"]
    return [text for text in found if not (outer is tuple and ... in typing.get_args(key.type) and not text)]


@pytest.mark.parametrize("name, key", rows())
def test_a_key_can_be_overridden_as_a_user_types_it(name, key):
    value, texts = good(key)
    for text in texts:
        values = plain(name)
        assign(ExperimentConfig, values, [f"{key.path}={text}"])
        found = at(values, key.path)
        assert found == value and type(found) is type(value), text
    if type(None) in typing.get_args(key.type):
        for text in ("none", "None"):
            assign(ExperimentConfig, values, [f"{key.path}={text}"])
            assert at(values, key.path) is None


@pytest.mark.parametrize("name, key", rows())
def test_a_wrong_value_is_refused_with_the_key(name, key):
    for text in bad(key):
        refused(ConfigError, configs.load, name, [f"{key.path}={text}"], saying=(key.path,))


@pytest.mark.parametrize("name, key", rows())
def test_a_wrong_value_in_an_experiment_is_refused_with_the_key(name, key):
    """As in a file, where values are no text: of another type, or not finite."""
    outer, kind = parts(key.type)
    wrong = [object(), {"a": 1}] + ([math.nan, math.inf] if kind is float else [])
    for value in [(w,) * 2 for w in wrong] if outer is tuple else wrong:
        values = plain(name)
        parent, _, last = key.path.rpartition(".")
        at(values, parent)[last] = value
        refused(ConfigError, configs.complete, values, saying=(key.path,))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_nothing_is_added_to_it(name):
    """Every field of every dataclass is a key; the page completes to itself, and typed back key by key is the same."""
    whole = page(name)
    assert configs.complete(whole).to_dict() == whole
    given = [f"{key.path}={spelled(key.value)}" for key in keys(ExperimentConfig, whole) if key.value != {}]
    assert len(given) > 150 and configs.load(name, given).to_dict() == whole


@pytest.mark.parametrize("name", PAGES)
def test_every_key_has_one_line_of_help_and_a_default_that_it_allows(name):
    for key in walk(ExperimentConfig, page(name)):
        assert 3 < len(key.help) < 120 and "\n" not in key.help and not key.help.endswith("."), key.path
        if not key.group and key.default is not MISSING and key.default != {}:
            values = plain(name)
            assign(ExperimentConfig, values, [f"{key.path}={spelled(key.default)}"])
            assert at(values, key.path) == key.default


@pytest.mark.parametrize("name", PAGES)
def test_an_older_page_gets_the_defaults_of_new_keys(name):
    """Each key that has a default can be missing; without one, the message says what it is."""
    for key in walk(ExperimentConfig, page(name)):
        if key.path.startswith(("stages", "codec.kind", "data.source", "order", "evals")) and key.path.count(".") < 3:
            continue  # tables, and what the rest of a group depends on
        values, (parent, _, last) = plain(name), key.path.rpartition(".")
        del at(values, parent)[last]
        required = key.default is MISSING and ".mix." not in key.path
        if required:
            refused(ConfigError, configs.complete, values, saying=(last, key.help[:40]))
        else:
            try:
                completed = configs.complete(values)
            except ConfigError as error:  # a default that does not fit the rest of this page
                assert "has no" not in str(error)
                continue
            if key.default is not MISSING and not dataclasses.is_dataclass(key.default):
                assert at(completed.to_dict(), key.path) == key.default, key.path
