"""`starflow2 config`."""

import shutil
import textwrap
from argparse import Namespace
from dataclasses import MISSING

from starflow2_jax.commands.arguments import Commands
from starflow2_jax.commands.experiment import add_config
from starflow2_jax.config.overrides import spelled
from starflow2_jax.fields import Key

LEFT = 50  # columns of a key and its value, before its help


def add(commands: Commands) -> None:
    """Add `starflow2 config` to the command line."""
    p = commands.add_parser("config", help="print every key of an experiment's config")
    add_config(p)
    p.add_argument("--runlocal", action="store_true", help="show the experiment as --runlocal shrinks it")
    p.set_defaults(run=_config)


def _config(args: Namespace, overrides: list[str]) -> None:
    from starflow2_jax.config import loading as configs

    config = configs.load(args.config, overrides, args.runlocal, args.chip, tuple(configs.PAGES))
    print(page(configs.described(config), shutil.get_terminal_size((120, 0)).columns))


def page(keys: list[Key], columns: int) -> str:
    """One or more lines for each key: its value as users type it, its help, and a star where it differs from the
    default.
    """
    count = sum(_differs(key) for key in keys)
    lines = [
        f"{count} of {sum(not _heads(key) for key in keys)} keys, marked *, differ from the defaults or have none."
    ]
    lines += ["Set a key with --config.KEY=VALUE, in all stages with --config.stages.*.KEY=VALUE.", ""]
    for key in keys:
        lines += ["", f"{key.path}: {key.help}"] if _heads(key) else _lines(key, columns)
    return "\n".join(lines)


def _lines(key: Key, columns: int) -> list[str]:
    left = f"{'*' if _differs(key) else ' '} {key.path} = {spelled(key.value)}"
    notes = [key.help]
    if choices := key.field.metadata["choices"]:
        notes.append(f"one of {', '.join(choices)}")
    if _differs(key) and key.default is not MISSING:
        notes.append(f"default {spelled(key.default)}")
    wrapped = textwrap.wrap("; ".join(notes), max(columns - LEFT - 1, 30))
    first = [f"{left:<{LEFT}} {wrapped[0]}"] if len(left) <= LEFT else [left, f"{'':{LEFT}} {wrapped[0]}"]
    return first + [f"{'':{LEFT}} {line}" for line in wrapped[1:]]


def _heads(key: Key) -> bool:
    """Whether the key has no value of its own: a group, or a table without entries."""
    return key.group or key.value == {}


def _differs(key: Key) -> bool:
    return not _heads(key) and key.value != key.default
