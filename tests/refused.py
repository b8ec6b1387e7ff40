"""What a refusal is to look like."""

import pytest

from starflow2_jax.errors import UserError


def refused(error: type, call, *args, saying: tuple[str, ...], **kwargs) -> None:
    """`call` raises `error`, a UserError, with one line that has all of `saying`."""
    assert issubclass(error, UserError)
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    assert all(word in message for word in saying), message
