"""Errors that a user can mend: the command line prints the message alone and exits with the error's exit code."""

import contextlib
import difflib
import errno
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path


class UserError(ValueError):
    """Wrong input. The message is one sentence for the user: what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A config that cannot be used; the message is one sentence for its author."""


class StorageError(UserError):
    """A file could not be written: the disk is full or read-only, or a quota is used up."""

    exit_code = 74  # EX_IOERR


class Terminated(BaseException):
    """The process was told to end (SIGTERM). The message says what is kept, where it is known."""


LONGEST = 90  # characters of a value that a message repeats
REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
OUT_OF_ROOM = "make room there, and start the same command again"


def require_one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises UserError, with the nearest allowed value, where `value` is not among the allowed ones."""
    if value not in allowed:
        [near] = difflib.get_close_matches(str(value), allowed, 1, 0.0)
        raise UserError(f"{name} is one of {', '.join(allowed)}, not {shown(value)}; did you mean {near!r}?")


def shown(value: object) -> str:
    """A value as messages repeat it: quoted, on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}...{text[0]}"


@contextlib.contextmanager
def storage_errors(folder: str | Path, standing: Callable[[], str] | None = None) -> Iterator[None]:
    """Raises StorageError in place of any error that means that the file system refused a write.

    `folder`: named where the error names no path. `standing`: makes a part of the sentence, about the
    checkpoints that are left.
    """
    try:
        yield
    except Exception as error:
        for earlier in _chain(error):
            if isinstance(earlier, StorageError):
                raise earlier from None
        if (cause := refused_write(error)) is None:
            raise
        path = getattr(error, "filename", None) or folder
        left = f" ({standing()})" if standing else ""
        raise StorageError(f"{path} cannot be written: {cause}{left}; {OUT_OF_ROOM}") from None


def refused_write(error: BaseException | None) -> str | None:
    """Why the file system refused a write, as the system words it; None if `error` and its causes are about something else.

    Libraries written in C++ and Rust report such errors as text, so their messages are searched.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            if one.errno in REFUSED_WRITES:
                return os.strerror(one.errno)
        elif found := next((os.strerror(n) for n in REFUSED_WRITES if os.strerror(n) in str(one)), None):
            return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that it followed."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
