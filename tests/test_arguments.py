"""Every option of every command with every kind of wrong value: exit code 2 and one line, before anything heavy begins.

The cases are made from the parsers, so an option is covered from the day that it is added.
"""

import argparse
import errno
import json
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import tiny
import torch
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.commands import arguments, training
from starflow2_jax.commands.arguments import (
    InputFile,
    InputFolder,
    InputPath,
    Number,
    OutputFile,
    OutputFolder,
    Shipped,
    Whole,
    WholeNumbers,
    Words,
)
from starflow2_jax.config import loading as configs
from starflow2_jax.data import encoding
from starflow2_jax.errors import Terminated
from starflow2_jax.fields import Key
from starflow2_jax.parallel import devices
from starflow2_jax.planning import compiling
from starflow2_jax.sweeps import points
from starflow2_jax.weights.vlm import write_config

WORDS = {
    "kind": "qwen2_5_vl",
    "benchmark": "digits",
    "topology": "v5e:4x4",
    "stage": "joint",
    "chip": "v5p",
    "host": "127.0.0.1",
    "api_key": "secret",
    "remat": "full",
    "source": "json:FILES/documents",  # FILES: the folder of the fixture
}
DOCUMENT = [{"text": "draw a seven"}, {"text": " seven", "predict": True}]
ABSURD = ("", "x", "nan", "inf", "-inf", "1e999", "9" * 5000, "1" + "0" * 30, "-1" + "0" * 30)
ADDRESSES = (
    "gs://bucket/run",
    "https://host.example/a.png",
    "file:///tmp/x",
    "data:text/plain," + "x" * 9000,
    "~",
    "~/run",
)
HARD_NAME = "with spaces, ünïcode 文 and 'quotes'"
DAMAGED = ("garbage", "truncated")  # files of which some commands can use what is left


class Begun(BaseException):
    """The arguments were accepted: the command starts devices, or other work that takes long."""


FAULTS: list[BaseException] = []  # what this work raises instead; empty: Begun


class Endless(BaseException):
    """A huge file, a pipe or an endless device is read. No `except OSError` may catch this."""


PARSER = cache(cli._parser)  # building it takes longer than most cases


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch, tmp_path):
    def begin(*args, **kwargs):
        raise FAULTS[-1] if FAULTS else Begun

    monkeypatch.setattr(cli, "_parser", PARSER)
    monkeypatch.setattr(devices, "start", begin)
    monkeypatch.setattr(training, "start_devices", begin)
    monkeypatch.setattr(compiling, "described_devices", begin)
    monkeypatch.setattr(encoding, "encode", begin)
    monkeypatch.setattr(points, "run", begin)
    monkeypatch.setattr(points, "submit", begin)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, too_long)
    yield
    FAULTS.clear()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def too_long(*_):
    raise Endless


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Right files and folders by the name of the option that takes them, and wrong ones in `wrong`."""
    folder = tmp_path_factory.mktemp("files")
    CheckpointDirectory(folder / "checkpoint").create(configs.load("digits_quick"), tiny.CODEC, tiny.tokenizer())
    for name in ("codec", "images", "data_dir"):  # of `encode`
        (folder / name).symlink_to("checkpoint")
    (folder / "vlm").mkdir()
    write_config(folder / "vlm" / "vlm.json", tiny.CONFIG.vlm)
    (folder / "runs").mkdir()
    (folder / "runs" / "scores.json").write_text('{"accuracy": 0.5}')
    torch.jit.script(torch.nn.Flatten()).save(str(folder / "features"))  # of `fid`, with the next one
    np.savez(folder / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    (folder / "reference").symlink_to("statistics.npz")
    (folder / "source").mkdir()
    (folder / "source" / "config.json").write_text("{}")
    (folder / "document").write_text(json.dumps(DOCUMENT))
    (folder / "documents").write_text(json.dumps(DOCUMENT[:1]) + "\n")
    Pillow.new("L", (8, 8), 200).save(folder / "image", "PNG")
    (folder / "captions").write_text("a seven\na two\n")
    (folder / "classes").write_text("a seven\na two\n")
    (folder / "imports.py").write_text("LOADED = True\n")
    (folder / "config.py").write_text(configs.find("digits_quick").read_text())
    (folder / "sweep.py").write_text((configs.EXPERIMENTS / "sweeps" / "digits_lr.py").read_text())
    wrong = folder / "wrong"
    (wrong / "a folder").mkdir(parents=True)
    (wrong / "empty").touch()
    (wrong / "empty.py").touch()
    (wrong / "garbage.py").write_bytes(b"\x00\xff(def")
    (wrong / "fails.py").write_text("import no_such_module_of_anyone\n")
    (wrong / "loop").symlink_to("loop")
    os.mkfifo(wrong / "pipe")
    for suffix in ("", ".py"):
        (wrong / f"huge{suffix}").touch()
        os.truncate(wrong / f"huge{suffix}", 10**12)  # a sparse file, which takes no room on the disk
    for name in ("config.json", "vlm.json", "codec.json"):
        for damage, content in (("garbage", b"\xff\xfe\x00"), ("truncated", b'{"model": ')):
            (wrong / f"a {damage} folder").mkdir(exist_ok=True)
            (wrong / f"a {damage} folder" / name).write_bytes(content)
    return folder


def commands() -> dict[str, argparse.ArgumentParser]:
    return PARSER()[0].choices


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and arguments that take a value."""
    return [action for action in parser._actions if action.nargs != 0]


OPTIONS = [(name, action.dest) for name, parser in commands().items() for action in options(parser)]


def right(action: argparse.Action, files: Path) -> str:
    """A value that the option takes."""
    if action.choices:
        return next(iter(action.choices))
    kind = action.type
    if isinstance(kind, Whole):
        return str(max(kind.least, 1))
    if isinstance(kind, Number):
        return str(max(kind.least, 0.5))
    if isinstance(kind, WholeNumbers):
        return "1,2"
    if isinstance(kind, OutputFile | OutputFolder):
        return "new folder/file" if isinstance(kind, OutputFile) else "new folder/new"
    if isinstance(kind, Words):
        return WORDS.get(action.dest, "some words").replace("FILES", str(files))
    python = isinstance(kind, Shipped) or action.dest == "imports"
    return str(files / (f"{action.dest}.py" if python else action.dest))


def command_line(name: str, files: Path, action: argparse.Action | None = None, value: str = "") -> list[str]:
    """The command with what it requires, and with `value` for one option."""
    parser = commands()[name]
    given = {a.dest: (a, right(a, files)) for a in parser._actions if a.required}
    for group in parser._mutually_exclusive_groups:
        if group.required and (action is None or action.dest not in [a.dest for a in group._group_actions]):
            first = group._group_actions[0]
            given[first.dest] = (first, right(first, files))
    if action is not None:
        given[action.dest] = (action, value)
    line = [name]
    for a, text in given.values():
        line.append(f"{a.option_strings[-1]}={text}" if a.option_strings else text)
    return line


def ends(line: list[str], capsys) -> tuple[int | None, str]:
    """The exit code, None for a command whose arguments were accepted, and stderr."""
    try:
        code = cli.main(line)
    except Begun:
        code = None
    return code, capsys.readouterr().err


def wrong(action: argparse.Action, files: Path) -> Iterator[tuple[str, str]]:
    """Wrong values of an option, by what is wrong."""
    kind, bad = action.type, files / "wrong"
    if action.choices:
        yield "no choice", "none of these"
    elif isinstance(kind, Whole | Number):
        yield from ((f"number {text[:9]}", text) for text in ABSURD)
        yield "below", str(kind.least - 1)
        if kind.most < arguments.MOST:
            yield "above", str(kind.most + 1)
        if isinstance(kind, Whole):
            yield "fraction", "1.5"
    elif isinstance(kind, WholeNumbers):
        yield from ((f"number {text[:9]}", text) for text in (*ABSURD, "0", "-1", "1,,2", "1,x", "1.5"))
    elif isinstance(kind, Words):
        yield "no UTF-8", "\udc80"
    elif isinstance(kind, OutputFile | OutputFolder):
        yield "empty path", ""
        yield from (("address", text) for text in ADDRESSES)
        yield "below a file", str(bad / "empty" / "below")
        yield "too long", str(bad / ("x" * 300))
        yield "unwritable", "/proc/nothing/here"
        yield "loop", str(bad / "loop" / "below")
        yield ("folder", str(bad)) if isinstance(kind, OutputFile) else ("file", str(bad / "empty"))
    else:
        suffix = Path(right(action, files)).suffix
        yield "empty path", ""
        yield from (("address", text) for text in ADDRESSES)
        yield "missing", str(bad / f"none{suffix}")
        yield "below a file", str(bad / "empty" / "below")
        yield "too long", str(bad / ("x" * 300 + suffix))
        yield "loop", str(bad / "loop")
        yield "empty", str(bad / f"empty{suffix}")
        if not isinstance(kind, InputFolder):
            yield "unreadable", "/proc/self/mem"
            yield "pipe", str(bad / "pipe")
            yield "device", "/dev/zero"
        if isinstance(kind, InputFolder | InputPath):
            yield "empty folder", str(bad / "a folder")
        if isinstance(kind, InputFolder):
            yield from ((damage, str(bad / f"a {damage} folder")) for damage in DAMAGED)
        elif not isinstance(kind, InputPath):
            yield "folder", str(bad / "a folder")
            yield "huge", str(bad / f"huge{suffix}")
            content = Path(right(action, files)).read_bytes()
            broken = {"garbage": b"\x89PNG\r\n\xff\xfe" * 9, "truncated": content[: len(content) * 2 // 3]}
            for damage in DAMAGED:
                path = Path(f"{damage}{suffix}").absolute()
                path.write_bytes(broken[damage])
                yield damage, str(path)


def may_work(action: argparse.Action, what: str) -> bool:
    """Wrong values that leave something to work with: the first lines of a file, the package's own name for "empty"."""
    return (
        what in DAMAGED
        and action.dest in ("captions", "classes", "imports", "images", "data_dir")
        or (what == "empty" and action.dest == "imports")
    )


@pytest.mark.parametrize("name, dest", OPTIONS)
def test_wrong_values(name, dest, files, capsys):
    action = next(a for a in options(commands()[name]) if a.dest == dest)
    assert action.choices or isinstance(action.type, arguments.KINDS), "give the option a kind of commands/arguments.py"
    shown = action.option_strings[-1] if action.option_strings else dest
    for what, value in wrong(action, files):
        signal.alarm(60)
        code, error = ends(command_line(name, files, action, value), capsys)
        if code is None and may_work(action, what):
            continue
        assert code == 2, (what, value[:100], error)
        assert error.startswith("starflow2: ") and error.count("\n") == 1 and len(error) < 700, (what, error)
        assert shown in error or dest in error or Path(value).name[:30] in error, (what, error)


@pytest.mark.parametrize("name", list(commands()))
def test_right_values(name, files, tmp_path, capsys):
    """Every option's right value is accepted, files and folders also by relative paths and hard names."""
    usual = ends(command_line(name, files), capsys)
    assert usual[0] == {"config": 0, "convert": 2, "compare": 0, "fid": 2}.get(name), usual
    for action in options(commands()[name]):
        values = [right(action, files)]
        if isinstance(action.type, OutputFile | OutputFolder):
            values.append(f"written {HARD_NAME}")
        elif isinstance(action.type, InputFile | InputFolder | InputPath | Shipped):
            hard = Path(f"{HARD_NAME}{Path(values[0]).suffix}")
            hard.unlink(missing_ok=True)
            hard.symlink_to(values[0])
            values.append(str(hard))
        for value in values:
            line = command_line(name, files, action, value)
            code, error = ends(line, capsys)
            if (name, action.dest) in (("init", "codec"), ("plan", "codec")) or action.dest in (
                "part",
                "chip",
                "launcher",
                "again",
                "coordinator",
                "process",
                "processes",
                "data",
                "limit",
            ):
                assert code in (None, 0, 2) and error.count("\n") <= 1, (line, error)  # what it means depends on others
            else:
                assert code == usual[0], (line, error)


OUTPUTS = [
    (name, action.dest) for name, p in commands().items() for action in options(p) if arguments.is_output(action.type)
]


@pytest.mark.parametrize("name, dest", OUTPUTS)
def test_disks_that_refuse_writes(name, dest, files, monkeypatch, capsys):
    """Full, over quota, read-only or another user's, from the start or once the command works: path and cause in one
    line.
    """
    action = next(a for a in options(commands()[name]) if a.dest == dest)
    line = command_line(name, files, action, "new folder/new")
    if ends(line, capsys)[0] is not None:
        pytest.skip("the command ends before it writes")
    for number, code in (
        (errno.ENOSPC, 74),
        (errno.EDQUOT, 74),
        (errno.EROFS, 74),
        (errno.EACCES, 2),
        (errno.EPERM, 2),
    ):
        fault = OSError(number, os.strerror(number))  # a write that fails names no path
        for at_once in (True, False):
            with monkeypatch.context() as patched:
                if at_once:
                    patched.setattr(arguments.tempfile, "TemporaryFile", lambda fault=fault, **_: raised(fault))
                FAULTS[:] = [fault]
                assert ends(line, capsys)[0] == code
                error = ends(line, capsys)[1].splitlines()[-1]  # `encode` shows its progress before
            assert "new folder/new" in error and fault.strerror in error, error
            assert error.startswith("starflow2: "), error


def raised(fault: BaseException) -> NoReturn:
    raise fault


@pytest.mark.parametrize("name", list(commands()))
@pytest.mark.parametrize(
    "fault, code, said", [(KeyboardInterrupt(), 130, "interrupted; "), (Terminated(), 75, "(SIGTERM); ")]
)
def test_signals(name, files, fault, code, said, monkeypatch, capsys):
    """While the command works: what is kept, in one line."""
    monkeypatch.setitem(commands()[name]._defaults, "run", lambda *_: raised(fault))
    ended, error = ends(command_line(name, files), capsys)
    assert ended == code and error.startswith("starflow2: ") and said in error and error.count("\n") == 1, error
    assert "kept" in error or "nothing was written" in error


def test_an_unknown_command_and_an_unknown_option(capsys):
    for line in (
        [],
        ["trian"],
        ["train", "--config=digits_quick", "--no-such=1"],
        ["train", "--config=digits_quick", "x"],
    ):
        code, error = ends(line, capsys)
        assert code == 2 and error.startswith("starflow2: ") and error.count("\n") == 1, error


def keys() -> list[Key]:
    return [key for key in configs.described(configs.load("digits_quick")) if not key.group]


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.path)
def test_absurd_values_of_config_keys(key, capsys):
    """Each is refused in one line, or is a value that the key can have."""
    for text in (*ABSURD, "0", "-1", "None", "(", "[" * 2000, "true"):
        code, error = ends(["config", "--config=digits_quick", f"--config.{key.path}={text}"], capsys)
        assert code in (0, 2), (text[:50], error)
        assert error.count("\n") == (code == 2) and len(error) < 900, (text[:50], error[:1000])
