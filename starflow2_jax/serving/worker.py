"""Continuous batching: one thread owns the device; requests come into rows of one batch that goes on in small chunks."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, Text
from starflow2_jax.data.tokenizer import chat
from starflow2_jax.sampling import rows as row
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.engine import Sampler, Session, bucket
from starflow2_jax.sampling.events import Answer, Event, Picture
from starflow2_jax.sampling.rows import Rows, SampleOptions
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.requests import ChatRequest

# Every row has the guidance branch and the cut of the vocabulary, so that one program serves all requests: without
# guidance its weight is 0, and top_p 1 keeps all tokens.
WIDEST = SampleOptions(guidance=1.0, top_p=0.5)
log = logging.getLogger(__name__)
_put = jax.jit(row.put, donate_argnums=0)


@dataclass(frozen=True)
class Started:
    """The prompt has been read."""

    prompt_tokens: int


@dataclass(frozen=True)
class Fault:
    """Nothing more comes of this request."""

    error: ApiError


@dataclass(eq=False)
class Job:
    """A chat request in the worker's hands. `tell` is called from the worker's thread."""

    request: ChatRequest
    tell: Callable[[Started | Event | Fault], None]
    cancelled: bool = False
    read: Rows | None = None  # its prompt, of one row, once it has been read
    options: SampleOptions | None = None
    placed: int = 0  # choices that have got a row


@dataclass(eq=False)
class Task:
    """Something else that needs the device."""

    run: Callable[[], object]
    result: Future = field(default_factory=Future)


class Worker(threading.Thread):
    """`rows` requests at once, the others wait, `max_queue` at most; a row holds `positions`, of which `max_tokens` written."""

    def __init__(
        self,
        sampler: Sampler,
        rows: int = 8,
        max_tokens: int = 512,
        max_queue: int = 32,
        chunk: int = 4,
        jacobi: int = 1,
    ):
        super().__init__(name="device", daemon=True)
        self.sampler, self.size, self.max_queue, self.chunk = sampler, rows, max_queue, chunk
        self.max_tokens = min(max_tokens, sampler.max_positions - 1)
        self.positions = sampler.max_positions
        self.widest = replace(WIDEST, jacobi=jacobi)
        self.slots, self.written = bucket(self.positions + jacobi), bucket(self.max_tokens)
        self.waiting: deque[Job | Task] = deque()
        self.news = threading.Condition()
        self.closing: float | None = None  # when the running requests are given up
        self.batch = self._empty()
        self.writing: list[tuple[Job, Answer] | None] = [None] * rows

    def warm(self) -> None:
        """Before the thread starts: compile what every request needs, by answering one with an image."""
        options = SampleOptions(image_first=True)
        most = min(self.max_tokens, self.sampler.model.cfg.tokens + 2)
        request = ChatRequest([("user", [Text("image")])], options, most, [0], stream=False, include_usage=False)
        self.submit(Job(request, lambda event: None))
        while self.waiting or self.running:
            self._turn()

    def submit(self, work: Job | Task) -> None:
        """Raises ApiError 429 where too many wait, 503 where the server is closing."""
        with self.news:
            if self.closing is not None:
                raise _closing()
            if len(self.waiting) >= self.max_queue:
                raise ApiError(429, f"{self.max_queue} requests are waiting already; try again later", "queue_full")
            self.waiting.append(work)
            self.news.notify()

    def cancel(self, job: Job) -> None:
        with self.news:
            job.cancelled = True
            self.news.notify()

    def close(self, seconds: float) -> None:
        """Take nothing more; what waits gets 503 now, what runs gets it after `seconds`. The thread then ends."""
        with self.news:
            self.closing = time.monotonic() + seconds
            self.news.notify()

    @property
    def running(self) -> int:
        return sum(w is not None for w in self.writing)

    def run(self) -> None:
        while True:
            with self.news:
                while not self.waiting and not self.running and self.closing is None:
                    self.news.wait()
                if self.closing is not None and (not self.running or time.monotonic() > self.closing):
                    break
            try:
                self._turn()
            except Exception:
                log.exception("a step of the batch failed; its requests are given up")
                self._give_up(ApiError(500, "the model failed while this was written; try again", "model_failed"))
                self.batch = self._empty()
        self._give_up(_closing())

    def _turn(self) -> None:
        if self.closing is not None:
            self._refuse_waiting()
        self._free([i for i, w in enumerate(self.writing) if w and w[0].cancelled])
        while (work := self._next()) is not None:
            if isinstance(work, Task):
                _finish(work)
            else:
                self._admit(work)
        if self.running:
            program = self.session.program
            self.batch = steps.write(program, self.sampler.params, self.batch, jnp.int32(self.chunk))
            self._report()

    def _next(self) -> Job | Task | None:
        """The first that waits, if it can be served now; a job stays first until all of its choices have rows."""
        with self.news:
            while self.waiting and isinstance(first := self.waiting[0], Job) and first.cancelled:
                self.waiting.popleft()
            if not self.waiting:
                return None
            if isinstance(self.waiting[0], Task):
                return self.waiting.popleft()
            return self.waiting[0] if None in self.writing else None

    def _admit(self, job: Job) -> None:
        """Read its prompt, if that is not done yet, and give its next choice a row."""
        try:
            if job.read is None:
                job.read = self._read(job)
        except Exception as error:
            self.waiting.remove(job)
            job.tell(Fault(_told(error)))
            return
        index, seed = self.writing.index(None), job.request.seeds[job.placed]
        self.batch = _put(self.batch, index, row.take(job.read, np.array([0]), np.array([seed], np.uint32)))
        answer = Answer(
            job.placed, self.sampler.tokenizer, self.sampler.model.cfg.tokens, self.sampler.ids.end, job.options.stop
        )  # fmt: skip
        self.writing[index] = job, answer
        job.placed += 1
        if job.placed == len(job.request.seeds):
            job.read = None
            with self.news:
                self.waiting.remove(job)

    def _read(self, job: Job) -> Rows:
        """The request's prompt in a row of its own, ready to be put into the batch. Raises DocumentError."""
        document = prompt(self.sampler, job.request)
        length = len(self.sampler.encoder(document, closed=False)["tokens"]) if document else 0
        left = self.positions - length
        most = job.request.max_tokens or max(1, min(self.max_tokens, left))
        if most > left:
            raise ApiError(
                400, f"a prompt of {length} positions and {most} to generate exceed the {self.positions} of a row; "
                "shorten the prompt or lower max_tokens", "context_length_exceeded", "messages",
            )  # fmt: skip
        job.options = replace(job.request.options, max_tokens=most, jacobi=self.widest.jacobi)
        session = self.sampler.session(self.widest, [0])
        session.rows = row.with_room(session.rows, self.slots)
        session.options = [job.options]
        if document:
            session.read([document])
        session.stream()  # begins the turn
        job.tell(Started(length))
        return _widened(session.rows, self.written)

    def _report(self) -> None:
        tokens, count, done = jax.device_get((self.batch.tokens, self.batch.count, self.batch.done))
        for i, held in enumerate(self.writing):
            if held is None:
                continue
            job, answer = held
            try:
                for event in answer.read(tokens[i, : count[i]], bool(done[i]), lambda at, i=i: self._pixels(i, at)):
                    if isinstance(event, Picture) and not np.isfinite(event.pixels).all():
                        raise ApiError(
                            500, "the model wrote an image that is no image; try another seed", "model_failed"
                        )
                    job.tell(event)
            except Exception as error:
                job.tell(Fault(_told(error)))
                self.cancel(job)
            if answer.ended or job.cancelled:
                self._free([i])

    def _pixels(self, index: int, at: int) -> np.ndarray:
        return self.sampler.decode(self.batch.u[index, at : at + self.sampler.model.cfg.tokens][None])[0]

    def _free(self, indices: list[int]) -> None:
        for i in indices:
            self.writing[i] = None
        if indices:
            free = np.array([w is None for w in self.writing])
            self.batch = self.batch.replace(done=self.batch.done | free)

    def _refuse_waiting(self) -> None:
        with self.news:
            refused, self.waiting = self.waiting, deque()
        for work in refused:
            if isinstance(work, Task):
                work.result.set_exception(_closing())
            else:
                work.tell(Fault(_closing()))
                work.cancelled = True

    def _give_up(self, error: ApiError) -> None:
        """Whoever has a row."""
        if self.closing is not None:
            self._refuse_waiting()
        for job in {held[0] for held in self.writing if held}:
            job.tell(Fault(error))
            self.cancel(job)
        self.writing = [None] * self.size

    def _empty(self) -> Rows:
        self.session: Session = self.sampler.session(self.widest, [0] * self.size)
        empty = row.with_room(self.session.rows, self.slots)
        return _widened(empty.replace(done=jnp.ones_like(empty.done)), self.written)


def prompt(sampler: Sampler, request: ChatRequest) -> Document:
    """The document that the answer continues: by the chat template, or, without one, what was said as it is, <|im_end|>
    behind what the model said."""
    if sampler.tokenizer.chat_template:
        return chat(sampler.tokenizer, request.turns)
    parts = [[*said, Text("<|im_end|>")] if role == "assistant" else said for role, said in request.turns]
    return [part for said in parts for part in said]


def _widened(rows: Rows, length: int) -> Rows:
    """With room for `length` positions in the record of what is written."""
    B, T, D = rows.u.shape
    tokens = jnp.full((B, length), -2, jnp.int32).at[:, :T].set(rows.tokens)
    return rows.replace(tokens=tokens, u=jnp.zeros((B, length, D)).at[:, :T].set(rows.u))


def _finish(task: Task) -> None:
    try:
        task.result.set_result(task.run())
    except Exception as error:
        task.result.set_exception(_told(error))


def _told(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DocumentError):
        return ApiError(400, str(error), "invalid_prompt", "messages")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "this request failed inside the server; its log says why", "internal_error")


def _closing() -> ApiError:
    return ApiError(503, "the server is closing; try again later", "closing")
