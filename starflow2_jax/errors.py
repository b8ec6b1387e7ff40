"""What a user can do wrong."""

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """Bad input. The message is one sentence for the user: what is wrong and what to do."""


class ConfigError(UserError):
    """A config that cannot be used; the message is one sentence for its author."""


class Terminated(BaseException):
    """The process was told to end (SIGTERM). The message says what is kept, where it is known."""


def require_one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raises UserError, with the nearest allowed value, where `value` is none of them."""
    if value not in allowed:
        [near] = difflib.get_close_matches(str(value), allowed, 1, 0.0)
        raise UserError(f"{name} is one of {', '.join(allowed)}, not {value!r}; did you mean {near!r}?")
