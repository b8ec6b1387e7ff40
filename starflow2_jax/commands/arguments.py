"""Kinds of options: each says which values an option takes. The parser checks them before anything is loaded.

Every option that takes a value has one of these kinds as its `type`, or has `choices`. tests/test_arguments.py makes
its cases from them.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from starflow2_jax.errors import LONGEST, REFUSED_WRITES, UserError, shown

MOST = 10**9  # largest count of anything
Commands = argparse._SubParsersAction  # the commands of the parser, as `add_subparsers` returns them


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, one sentence, where argparse prints its usage and exits."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises UserError. argparse calls this for arguments that it cannot parse."""
        message = " ".join(message.removeprefix("argument ").split())
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


@dataclass(frozen=True)
class Words:
    """Any text that UTF-8 can hold. `written`: it names a place to write that the command itself checks, such as a
    bucket.
    """

    written: bool = False

    def __call__(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise argparse.ArgumentTypeError("the text is not valid UTF-8; check the terminal's encoding") from None
        return text


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int
    most: int = MOST

    def __call__(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not self.least <= number <= self.most:
            raise argparse.ArgumentTypeError(f"takes a whole number {_range(self)}, not {shown(text)}")
        return number


@dataclass(frozen=True)
class Number:
    """A finite number from `least` to `most`."""

    least: float
    most: float = MOST

    def __call__(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not self.least <= number <= self.most:  # NaN is in no range
            raise argparse.ArgumentTypeError(f"takes a number {_range(self)}, not {shown(text)}")
        return number


@dataclass(frozen=True)
class WholeNumbers:
    """Whole numbers of at least 1, with commas between them."""

    def __call__(self, text: str) -> list[int]:
        try:
            return [Whole(1)(number) for number in text.split(",")]
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"takes whole numbers such as 1,2,4, not {shown(text)}") from None


@dataclass(frozen=True)
class InputFile:
    """A file that can be read and is not empty."""

    def __call__(self, text: str) -> str:
        path = _there(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{shown(text)} is a folder; name a file")
        if not path.is_file():  # it would be read more than once
            raise argparse.ArgumentTypeError(f"{shown(text)} is a pipe or a device; write a file, and name that")
        try:
            with path.open("rb") as file:
                if not file.read(1):
                    raise argparse.ArgumentTypeError(f"the file {shown(text)} is empty")
        except OSError as error:
            raise argparse.ArgumentTypeError(f"the file {shown(text)} cannot be read ({error.strerror})") from None
        return text


@dataclass(frozen=True)
class InputFolder:
    """A folder that can be listed and is not empty. `what`: the word for it in messages."""

    what: str = "folder"

    def __call__(self, text: str) -> str:
        path = _there(text, self.what)
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"{shown(text)} is a file; name a {self.what}")
        try:
            empty = not os.listdir(path)
        except OSError as error:
            raise argparse.ArgumentTypeError(
                f"the {self.what} {shown(text)} cannot be read ({error.strerror})"
            ) from None
        if empty:
            raise argparse.ArgumentTypeError(f"the {self.what} {shown(text)} is empty")
        return text


@dataclass(frozen=True)
class InputPath:
    """A file or a folder that can be read and is not empty."""

    def __call__(self, text: str) -> str:
        return InputFolder()(text) if _there(text).is_dir() else InputFile()(text)


@dataclass(frozen=True)
class Shipped:
    """A Python file, or the name of one that ships with the package. `config.loading` and `sweeps.points` look for
    it.
    """

    def __call__(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class OutputFile:
    """A file that can be written. The folders above it need not exist yet."""

    def __call__(self, text: str) -> str:
        if _exists(text) and Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"{shown(text)} is a folder; name a file")
        _try_to_write(text, Path(text).parent)
        return text


@dataclass(frozen=True)
class OutputFolder:
    """A folder that can be written into, or that can be created."""

    def __call__(self, text: str) -> str:
        if _exists(text) and not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"{text[:LONGEST]}: File exists; name a folder")
        _try_to_write(text, Path(text))
        return text


OUTPUTS = (OutputFile, OutputFolder)
KINDS = (Words, Whole, Number, WholeNumbers, InputFile, InputFolder, InputPath, Shipped, *OUTPUTS)


def add_share(p: argparse.ArgumentParser, of: str) -> None:
    """Add --process and --processes. of: what the processes share."""
    p.add_argument(
        "--process", type=Whole(0), default=0, metavar="I", help="number of this process, counted from 0 (default: 0)"
    )
    p.add_argument(
        "--processes",
        type=Whole(1),
        default=1,
        metavar="N",
        help=f"number of processes that share the {of} (default: 1)",
    )


def require_writable(option: str, folder: str) -> None:
    """Raises UserError if a folder that `option` names for reading cannot be written into."""
    try:
        OutputFolder()(folder)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{option}: {error}") from None


def is_output(kind: object) -> bool:
    """Whether the command writes where options of this kind say."""
    return isinstance(kind, OUTPUTS) or (isinstance(kind, Words) and kind.written)


def outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The files and folders to write that the command line names. `parser`: the command's."""
    actions = [action for action in parser._actions if is_output(action.type)]
    return [value for action in actions if (value := getattr(args, action.dest, None))]


def _range(kind: Whole | Number) -> str:
    return f"of at least {kind.least}" if kind.most == MOST else f"from {kind.least} to {kind.most}"


def _exists(text: str) -> bool:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    if "://" in text or text.startswith("data:"):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is an address; give a path on this machine, mounted or downloaded"
        )
    if text.split("/")[0] == "~":
        raise argparse.ArgumentTypeError(
            f"{shown(text)} begins with ~, which the shell has not replaced; write the whole path"
        )
    return _asked(text, Path(text).exists)


def _there(text: str, what: str = "file or folder") -> Path:
    if not _exists(text):
        raise argparse.ArgumentTypeError(f"there is no {what} {shown(text)}")
    return Path(text)


def _asked(text: str, question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (OSError, ValueError) as error:  # a path that is too long, cannot be reached or holds a NUL character
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"{shown(text)} cannot be used as a path ({reason})") from None


def _try_to_write(text: str, folder: Path) -> None:
    """Write an unnamed file into `folder`, or into the nearest folder above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in REFUSED_WRITES:  # these have an exit code of their own, with which the command will end
            raise argparse.ArgumentTypeError(f"{text[:LONGEST]}: {error.strerror}; name another path") from None
