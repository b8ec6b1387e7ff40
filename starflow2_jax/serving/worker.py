"""Continuous batching: one thread owns the device and writes the answers to all requests as rows of one batch.

The batch is written in chunks of a few positions. Between two chunks, finished answers leave their rows, and the
answers to new requests enter free rows.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.sampling import rows as row
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.events import Answer, End, Event, Picture, Words, as_document
from starflow2_jax.sampling.rows import BUCKET, Controls, Rows, SampleOptions, bucket, power
from starflow2_jax.sampling.session import Session
from starflow2_jax.serving.conversation_cache import Conversations
from starflow2_jax.serving.errors import ApiError, told
from starflow2_jax.serving.jobs import Fault, Job, ScoredWords, Started, Task
from starflow2_jax.serving.logprobs import Spelling
from starflow2_jax.serving.prompts import Turns, identity, pieces, prompt
from starflow2_jax.serving.reader import PIECE, Reader, rounded
from starflow2_jax.serving.requests import TOP_LOGPROBS, ChatRequest

# Every row has the guidance branch, so that one program serves all requests. A request without guidance has weight 0.
WIDEST = SampleOptions(guidance=1.0, max_tokens=1)
log = logging.getLogger(__name__)
_put = jax.jit(row.put, donate_argnums=0)


@dataclass(eq=False)
class Writing:
    """An answer that a row is writing: one choice of a job."""

    job: Job
    options: SampleOptions
    answer: Answer
    turns: Turns  # the conversation that it answers
    begun: float  # time at which it was put into its row
    heard: list[Event] = field(default_factory=list)  # its events so far


class Worker(threading.Thread):
    """The thread that owns the device.

    `rows`: number of answers that are written at the same time. `max_tokens`: longest answer, in positions.
    `max_queue`: number of requests that may wait. `chunk`: positions that are written between two looks at the queue.
    `jacobi`: image tokens that are solved for at once; 0: as calibrated. `keep`: number of conversations whose caches
    are kept, so that a request that continues one reads only its new part. `editing`: rows also have the guidance
    branch that drops the text but keeps the images. `draws`: whether the model writes images; if not, rows have no
    guidance branch. `images`: how the model sees images that set no `via`.
    """

    def __init__(
        self,
        sampler: Sampler,
        rows: int = 8,
        max_tokens: int = 512,
        max_queue: int = 32,
        chunk: int = 4,
        jacobi: int = 0,
        keep: int = 4,
        editing: bool = False,
        draws: bool = True,
        images: str = "flow",
    ):
        super().__init__(name="device", daemon=True)
        self.sampler, self.size, self.max_queue, self.chunk = sampler, rows, max_queue, chunk
        self.max_tokens = min(max_tokens, sampler.max_positions - 1)
        self.positions = sampler.max_positions
        self.draws, self.images = draws, images
        guidance, image_guidance = float(draws), 1.0 if editing else None
        self.widest = replace(
            WIDEST, jacobi=jacobi, guidance=guidance, image_guidance=image_guidance, logprobs=TOP_LOGPROBS
        )
        self.spelling = Spelling(sampler.tokenizer)
        self.fresh = self._session(1)  # an empty conversation
        # A step may write `jacobi` positions beyond the last one, and a piece of a prompt is padded to a multiple of
        # BUCKET.
        beyond = max(self.fresh.program.jacobi, BUCKET - 1)
        self.capacity, self.written = rounded(self.positions + beyond), bucket(self.max_tokens)
        self.waiting: deque[Job | Task] = deque()
        # The one job whose prompt is being read, or the one task that is being done, with its remaining pieces.
        self.entering: tuple[Job | Task, Iterator[None]] | None = None
        self.conversations = Conversations(sampler, self.widest, keep)
        self.news = threading.Condition()  # guards `waiting` and `closing`
        self.closing: float | None = None  # the time at which running requests are given up; None: the server is open
        self.lost = False  # whether the device failed and did not recover
        self.reader = Reader(sampler, self.capacity, lambda: self._with_room(self._session(1).rows))
        self.seconds = 1.0  # that an answer takes, on average of late
        self.batch = self._empty()
        self.writing: list[Writing | None] = [None] * rows

    def job(self, request: ChatRequest, tell: Callable[[Started | Event | Fault], None]) -> Job:
        """A request with its encoded prompt, ready for `submit`. Needs no device.

        `tell`: called on this thread with each event. Raises ApiError and DocumentError for a prompt that does not fit.
        """
        lanes = self.fresh.encode(prompt(self.sampler, request.turns, request.variables))
        length = len(lanes[0]["tokens"])
        if not length and not request.options.image_first:
            raise DocumentError("the prompt is empty; give some text or an image")
        self._left(length)
        # The template may write earlier turns by these variables, so the caches of other requests do not fit.
        known = None if request.variables else identity(request.turns)
        return Job(request, known, lanes, tell)

    def _left(self, length: int) -> int:
        """Number of positions that may be written after a prompt. Raises ApiError if there is none."""
        if length >= self.positions:
            message = f"a prompt of {length} positions leaves none of the {self.positions} of a row for an answer"
            raise ApiError(400, f"{message}; shorten the prompt", "context_length_exceeded", "messages")
        return min(self.max_tokens, self.positions - length)

    def warm(self) -> None:
        """Compile the programs that most requests need, by answering two. Call it before the thread starts."""
        options = SampleOptions(image_first=self.draws, max_images=int(self.draws))
        most = min(self.max_tokens, self.sampler.model.cfg.tokens + 2) if self.draws else 1
        sights: tuple[Document, ...] = ([Text("image")], [*self._blank_picture(), Text("image")])
        for said in sights:
            request = ChatRequest([("user", said)], options, most, [0], stream=False, include_usage=False)
            with contextlib.suppress(ApiError, DocumentError):  # a picture may be too large for a short row
                self.submit(self.job(request, lambda event: None))
            while self.waiting or self.entering or self.running:
                self._turn()
        self.conversations.forget()
        if self.draws:
            cfg = self.sampler.model.cfg
            for count in {power(n + 1) for n in range(self.size)}:  # numbers of images that are decoded together
                self.sampler.decode(np.zeros((count, cfg.tokens, cfg.channels)), self.widest.calibrated)

    def _blank_picture(self) -> Document:
        """The smallest image that a prompt may show in the way that requests do; nothing for a model that sees none."""
        codec = self.sampler.codec
        if self.images == "vit":
            return (
                [Image(np.zeros((1, 1, codec.image_channels), np.float32), via="vit")]
                if self.sampler.encoder.vision
                else []
            )
        return [Image(np.zeros((*codec.grid, codec.channels), np.float32), encoded=True)]

    def seconds_to_wait(self, ahead: int) -> int:
        """Estimated seconds until a request gets a row, with `ahead` requests before it; at least 1, at most 600."""
        return min(max(math.ceil(self.seconds * ahead / self.size), 1), 600)

    def submit(self, work: Job | Task) -> None:
        """Put work into the queue. Raises ApiError: 429 if too many requests wait, 503 if the server is closing."""
        with self.news:
            if self.closing is not None:
                raise _closing()
            if len(self.waiting) >= self.max_queue:
                seconds = self.seconds_to_wait(len(self.waiting))
                message = f"{self.max_queue} requests are already waiting; try again later"
                raise ApiError(429, message, "queue_full", retry=seconds)
            self.waiting.append(work)
            self.news.notify()

    def cancel(self, work: Job | Task) -> None:
        """Drop work: if it waits, at once; if it has a row, before the next chunk."""
        with self.news:
            work.cancel()
            if work in self.waiting:
                self.waiting.remove(work)
            self.news.notify()

    def close(self, seconds: float) -> None:
        """Accept no more work, and end the thread. Waiting requests get 503 now, running ones after `seconds`."""
        with self.news:
            self.closing = time.monotonic() + seconds
            self.news.notify()

    @property
    def running(self) -> int:
        """Number of rows that write an answer."""
        return sum(w is not None for w in self.writing)

    def run(self) -> None:
        """The thread's loop: work until `close`, or until the device fails and no new batch can be made."""
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception:  # of any kind: one failed step must not end the server
                    log.exception("a step of the batch failed; its requests get an error")
                    self._give_up(
                        ApiError(500, "the model failed while it wrote this answer; try again", "model_failed")
                    )
                    self.batch = self._empty()
        except Exception:  # of any kind: the thread must still answer those who wait for it
            log.exception("the device failed and did not recover")
            self.lost = True
        finally:
            self.close(0)  # no request waits for a thread that has ended
            self._refuse_waiting()
            if self.entering:
                self.entering[0].fail(_closing())
            self._give_up(_closing())

    def _wait(self) -> bool:
        """Wait until there is work. Returns False when the thread must end."""
        with self.news:
            while not self.waiting and not self._busy and self.closing is None:
                self.news.wait()
            return self.closing is None or (self._busy and time.monotonic() <= self.closing)

    @property
    def _busy(self) -> bool:
        return self.running > 0 or self.entering is not None

    def _turn(self) -> None:
        """Free the rows of cancelled jobs, do one piece of entering work, and write one chunk."""
        if self.closing is not None:
            self._refuse_waiting()
        self._free([i for i, w in enumerate(self.writing) if w and w.job.cancelled])
        self._advance()
        if self.running:
            self.batch = self.sampler.run_step(self.program, steps.write, self.batch, jnp.int32(self.chunk))
            self._report()

    def _advance(self) -> None:
        """Do one piece of the work in `entering`, after taking work from the queue if there is none."""
        self.entering = self.entering or self._next()
        if self.entering is None:
            return
        work, pieces_left = self.entering
        try:
            if work.cancelled or next(pieces_left, True):  # True: no piece is left
                self.entering = None
        except Exception as error:  # of any kind: it concerns this work alone
            self.entering = None
            work.fail(told(error))
            if any(x.is_deleted() for x in jax.tree.leaves(self.batch)):
                raise  # unless the batch was donated to the program that failed, and is lost

    def _next(self) -> tuple[Job | Task, Iterator[None]] | None:
        """Take the first work from the queue, with its pieces. A job waits until a row is free."""
        with self.news:
            if not self.waiting or (isinstance(self.waiting[0], Job) and None not in self.writing):
                return None
            work = self.waiting.popleft()
        return work, self._enter(work) if isinstance(work, Job) else _solve(work)

    def _enter(self, job: Job) -> Iterator[None]:
        """Read the job's prompt piece by piece, then put each of its choices into a row as rows become free."""
        turns, rows, lanes = self._beginning(job)
        cached = int(rows.caches.length[0])
        length = cached + len(lanes[0]["tokens"])
        most = min(job.request.max_tokens or self.max_tokens, self._left(length))
        for lane, features in enumerate(lanes):
            used = int(rows.caches.length[lane])
            for number, piece in enumerate(pieces(features, PIECE)):
                if lane or number:
                    yield
                rows = yield from self.reader.read(self.program, rows, lane, piece, used, lambda: self.running > 0)
                used += len(piece["tokens"])
        options = replace(job.request.options, max_tokens=most, jacobi=self.widest.jacobi)
        rows = self._new_turn(rows, [_for_branches(options, self.widest.branches)])
        job.say(Started(length, cached))
        for choice, seed in enumerate(job.request.seeds):
            while None not in self.writing:
                yield
            index = self.writing.index(None)
            chosen = self.sampler.run(row.take, rows, np.array([0]), np.array([seed], np.uint32))
            self.batch = self.sampler.run(_put, self.batch, index, chosen)
            cfg, tokenizer = self.sampler.model.cfg, self.sampler.tokenizer
            answer = Answer(choice, tokenizer, cfg.tokens, self.sampler.ids.end, options.stop)
            self.writing[index] = Writing(job, options, answer, turns, time.monotonic())

    def _beginning(self, job: Job) -> tuple[Turns, Rows, list[dict]]:
        """The conversation, a row whose caches hold the part that was read before, and for each lane the features to
        read.
        """
        if job.identity and (found := self.conversations.go_on(job.request.turns, job.identity)):
            turns, rows, lanes = found
            return turns, self._with_room(rows), lanes
        return job.request.turns, self._with_room(self._session(1).rows), job.lanes

    def _report(self) -> None:
        """Send the events of the last chunk to their jobs, and free the rows of finished answers."""
        tokens, count, done = jax.device_get((self.batch.tokens, self.batch.count, self.batch.done))
        records = [tokens[i, : count[i]] for i in range(self.size)]
        whole = [w.answer.whole(record) if w else [] for w, record in zip(self.writing, records, strict=True)]
        pictures = self.sampler.pictures(self.batch.u, whole, self.widest.calibrated)
        for i, writing in enumerate(self.writing):
            if writing is None:
                continue
            job, answer = writing.job, writing.answer
            try:
                for event in answer.read(records[i], bool(done[i]), pictures[i]):
                    self._heard(i, writing, event)
                    job.say(self._with_scores(i, writing, event))
            except Exception as error:  # of any kind: it concerns this answer alone
                job.fail(told(error))
            if answer.ended or job.cancelled:
                self._free([i])

    def _heard(self, index: int, writing: Writing, event: Event) -> None:
        """Note an event of the answer in row `index`, and keep the conversation if it ends the answer. Raises
        ApiError.
        """
        if isinstance(event, Picture) and not np.isfinite(event.pixels).all():
            raise ApiError(
                500, "the model wrote an image with values that are not finite; try another seed", "model_failed"
            )
        writing.heard.append(event)
        if isinstance(event, End):
            self.seconds += (time.monotonic() - writing.begun - self.seconds) / 8
        # Text that a stop string cut off is still in the caches.
        if isinstance(event, End) and not writing.answer.cut and writing.job.identity:
            self.conversations.keep([*writing.turns, ("assistant", as_document(writing.heard))], self.batch, index)

    def _with_scores(self, index: int, writing: Writing, event: Event) -> Event:
        """The event with the log-probabilities of its words, if the request wants them."""
        top = writing.options.logprobs
        if top is None or not isinstance(event, Words):
            return event
        at = np.array(event.places, int)
        likely, logprobs = jax.device_get((self.batch.likely, self.batch.logprobs))
        scores = self.spelling.entries(likely[index, at], logprobs[index, at], top)
        return ScoredWords(event.choice, event.text, event.places, tuple(scores))

    def _free(self, indices: list[int]) -> None:
        """Drop the answers of these rows, and mark all free rows as done, so that steps skip them."""
        for i in indices:
            self.writing[i] = None
        if indices:
            free = np.array([w is None for w in self.writing])
            self.batch = self.batch.replace(done=self.batch.done | free)

    def _refuse_waiting(self) -> None:
        """Empty the queue; its work gets 503."""
        with self.news:
            refused, self.waiting = self.waiting, deque()
        for work in refused:
            work.fail(_closing())

    def _give_up(self, error: ApiError) -> None:
        """Send an error to every request that has a row, and free the rows."""
        for job in {w.job for w in self.writing if w}:
            job.fail(error)
        self.writing = [None] * self.size

    def _session(self, size: int) -> Session:
        return self.sampler.session(self.widest, [0] * size)

    def _empty(self) -> Rows:
        """A batch of free rows."""
        session = self._session(self.size)
        self.program = session.program
        rows = self._new_turn(self._with_room(session.rows), [self.widest] * self.size)
        return rows.replace(done=jnp.ones_like(rows.done))

    def _new_turn(self, rows: Rows, options: list[SampleOptions]) -> Rows:
        """The rows, ready to write a new answer with these options."""
        begun, idle = np.zeros(len(options), np.int32), np.zeros(len(options), bool)
        controls = Controls.of(options, self.widest.branches, idle)
        return rows.replace(**self.sampler.run(row.new_turn, rows, controls, self.written, begun, idle))

    def _with_room(self, rows: Rows) -> Rows:
        """The rows, with caches of the batch's capacity."""
        return self.sampler.run(row.with_room, rows, self.capacity)


def _for_branches(options: SampleOptions, branches: tuple[str, ...]) -> SampleOptions:
    """The options for rows with these guidance branches.

    With both branches, plain guidance compares with the unconditional one, which `image_guidance` weighs.
    """
    if len(branches) < 2 or options.image_guidance is not None:
        return options
    return replace(options, guidance=0.0, image_guidance=options.guidance)


def _solve(task: Task) -> Iterator[None]:
    task.result.set_result((yield from task.pieces))


def _closing() -> ApiError:
    return ApiError(503, "the server is closing; try again later", "closing")
