"""What is in the worker's hands: chat requests and other work for the device, and what they are told."""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from starflow2_jax.sampling.events import Event
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.requests import ChatRequest


@dataclass(frozen=True)
class Started:
    """The prompt has been read, its first `cached` positions in an earlier request."""

    prompt_tokens: int
    cached: int


@dataclass(frozen=True)
class Fault:
    """Nothing more comes of this request."""

    error: ApiError


@dataclass(eq=False)
class Job:
    """A chat request, its conversation's `identity` and its prompt encoded for each lane of a row. `tell` is called from the
    worker's thread."""

    request: ChatRequest
    identity: tuple
    lanes: list[dict[str, np.ndarray]]
    tell: Callable[[Started | Event | Fault], None]
    cancelled: bool = False

    def say(self, event: Started | Event | Fault) -> None:
        try:
            if not self.cancelled:
                self.tell(event)
        except RuntimeError:  # its event loop is closed: nobody listens any more
            self.cancelled = True

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True

    def fail(self, error: ApiError) -> None:
        self.say(Fault(error))
        self.cancelled = True


@dataclass(eq=False)
class Task:
    """Something else that needs the device. Rows go on between its pieces; what it returns is the result."""

    pieces: Generator[None, None, object]
    result: Future = field(default_factory=Future)
    cancelled: bool = False

    def __post_init__(self):
        self.result.set_running_or_notify_cancel()  # from here on it takes a result, whoever has stopped waiting

    def cancel(self) -> None:
        """Nobody waits for its result any more."""
        self.cancelled = True

    def fail(self, error: ApiError) -> None:
        self.cancelled = True
        self.result.set_exception(error)
