"""Work for the worker's thread: chat requests, other tasks for the device, and the events that they send."""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from starflow2_jax.sampling.events import Event, Words
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.requests import ChatRequest


@dataclass(frozen=True)
class Started:
    """The prompt has been read."""

    prompt_tokens: int  # positions of the prompt
    cached: int  # of these, the first positions that were in the caches of an earlier request


@dataclass(frozen=True)
class ScoredWords(Words):
    """Words with the log-probabilities of their tokens, see `logprobs.Spelling.entries`."""

    scores: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Fault:
    """The request has failed. This is its last event."""

    error: ApiError


@dataclass(eq=False)
class Job:
    """A chat request with its encoded prompt."""

    request: ChatRequest
    identity: tuple | None  # of its conversation, see prompts.identity; None: not to be kept or continued
    lanes: list[
        dict[str, np.ndarray]
    ]  # the features of the prompt for each lane of a row: the answer's, and its guidance's
    tell: Callable[[Started | Event | Fault], None]  # the worker's thread calls it with each event
    cancelled: bool = False

    def say(self, event: Started | Event | Fault) -> None:
        """Send an event, unless the job was cancelled."""
        try:
            if not self.cancelled:
                self.tell(event)
        except RuntimeError:  # the client's event loop is closed
            self.cancelled = True

    def cancel(self) -> None:
        """Drop the job, because its client has gone."""
        self.cancelled = True

    def fail(self, error: ApiError) -> None:
        """Send the error as the last event."""
        self.say(Fault(error))
        self.cancelled = True


@dataclass(eq=False)
class Task:
    """Work for the device that is not an answer, such as a ranking. It runs piece by piece, and the batch takes steps
    between two pieces.
    """

    pieces: Generator[None, None, object]  # does a piece per `next`, and returns the result
    result: Future = field(default_factory=Future)
    cancelled: bool = False

    def __post_init__(self):
        self.result.set_running_or_notify_cancel()  # a running future cannot be cancelled, so it always takes a result

    def cancel(self) -> None:
        """Drop the task, because its client has gone."""
        self.cancelled = True

    def fail(self, error: ApiError) -> None:
        """Raise the error where the result is awaited."""
        self.cancelled = True
        self.result.set_exception(error)
