"""Work for the worker's thread: chat requests and other tasks for the device, and the events that they receive."""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from starflow2_jax.sampling.events import Event
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.requests import ChatRequest


@dataclass(frozen=True)
class Started:
    """The prompt has been read; its first `cached` positions were in the caches of an earlier request."""

    prompt_tokens: int
    cached: int


@dataclass(frozen=True)
class Fault:
    """The request has failed; no more events follow."""

    error: ApiError


@dataclass(eq=False)
class Job:
    """A chat request, its conversation's `identity`, and its prompt encoded for each lane of a row.

    The worker's thread calls `tell` with each event.
    """

    request: ChatRequest
    identity: tuple
    lanes: list[dict[str, np.ndarray]]
    tell: Callable[[Started | Event | Fault], None]
    cancelled: bool = False

    def say(self, event: Started | Event | Fault) -> None:
        try:
            if not self.cancelled:
                self.tell(event)
        except RuntimeError:  # the client's event loop is closed
            self.cancelled = True

    def cancel(self) -> None:
        """Drop the job: nobody waits for it any more."""
        self.cancelled = True

    def fail(self, error: ApiError) -> None:
        self.say(Fault(error))
        self.cancelled = True


@dataclass(eq=False)
class Task:
    """Other work for the device, as a generator. Rows go on between its pieces; its return value is the result."""

    pieces: Generator[None, None, object]
    result: Future = field(default_factory=Future)
    cancelled: bool = False

    def __post_init__(self):
        self.result.set_running_or_notify_cancel()  # the future then accepts a result even if nobody waits

    def cancel(self) -> None:
        """Drop the task: nobody waits for its result any more."""
        self.cancelled = True

    def fail(self, error: ApiError) -> None:
        self.cancelled = True
        self.result.set_exception(error)
