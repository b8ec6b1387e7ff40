"""Errors that a user can correct. The command line prints their message without a traceback, and ends with their exit
code.
"""

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
    """A config that cannot be used."""


class StorageError(UserError):
    """A file could not be written: the disk is full or read-only, or a quota is used up."""

    exit_code = 74  # EX_IOERR


class Terminated(BaseException):
    """The process received SIGTERM. The message says which results are kept, if that is known, or is empty."""


LONGEST = 90  # characters of a value that a message repeats
REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no space, over quota, read-only
OUT_OF_ROOM = "make room there, and start the same command again"


def require_one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises UserError, with the most similar allowed value, if `value` is not allowed. `name`: the key or argument,
    for the message.
    """
    if value not in allowed:
        [near] = difflib.get_close_matches(str(value), allowed, 1, 0.0)
        raise UserError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}; did you mean {near!r}?")


def shown(value: object) -> str:
    """A value for a message: quoted, on one line, and at most LONGEST characters of it."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}...{text[0]}"


@contextlib.contextmanager
def storage_errors(folder: str | Path, standing: Callable[[], str] | None = None) -> Iterator[None]:
    """A context that raises StorageError in place of any error by which the file system refused a write.

    `folder`: named in the message if the error names no path. `standing`: makes a part of the message, which says what
    is still there, such as the newest checkpoint.
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
    """The system's words for why it refused a write, if that is what `error` or one of its causes reports; else None.

    Libraries in C++ and Rust report such errors as text, so the messages are searched.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            if one.errno in REFUSED_WRITES:
                return os.strerror(one.errno)
        elif found := next((os.strerror(n) for n in REFUSED_WRITES if os.strerror(n) in str(one)), None):
            return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
