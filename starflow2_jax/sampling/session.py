"""A batch of conversations that reads documents, writes answers, reads more, and can be forked.

All rows step together, each in its own mode: writing text, writing an image, or done. A row starts an image at
<|vision_start|> and returns to text after the image's last token.
"""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Many
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.data.pipeline import collate
from starflow2_jax.errors import UserError
from starflow2_jax.models.jacobi import Jacobi
from starflow2_jax.parallel import sharding
from starflow2_jax.sampling import rows as row
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.events import Answer, Event, as_document, text_runs
from starflow2_jax.sampling.prompts import is_empty, require_no_image_tokens
from starflow2_jax.sampling.rows import Controls, Rows, SampleOptions, bucket, power
from starflow2_jax.sampling.runtime import Runtime
from starflow2_jax.sampling.steps import Program
from starflow2_jax.sequence import Shape

log = logging.getLogger(__name__)


class Session:
    """A batch of conversations with one sampler. The caches of both streams keep everything that was read or written.

    `options`: those of all rows, or a list with those of each; the rows share `stop`, `jacobi`, `tolerance`,
    `logprobs` and `branches`. Row i depends on its documents and on seeds[i] alone, not on the rest of the batch.
    `rows`: smallest size of the batch, filled up by idle rows. `state`: rows that have read something already; None:
    empty rows. Raises UserError for options that do not go together.
    """

    def __init__(
        self,
        sampler: Runtime,
        options: SampleOptions | Many[SampleOptions],
        seeds: Many[int],
        rows: int = 0,
        state: Rows | None = None,
    ):
        self.sampler, self.size = sampler, len(seeds)
        several = [options] * self.size if isinstance(options, SampleOptions) else options
        self.options = [o.sized(sampler.model.cfg.tokens) for o in several]
        spare = _spare(sampler, self.size, rows)
        self.options += self.options[-1:] * spare
        self.program = self._program(self.options)
        empty = partial(
            sampler.run,
            row.empty_rows,
            sampler.model,
            _seeds(seeds, spare),
            self.program.branches,
            self.options[0].scored,
        )
        self.rows: Rows = empty() if state is None else state

    def _program(self, options: list[SampleOptions]) -> Program:
        """The program for the rows' options. Raises UserError if these do not go together."""
        one, sampler = options[0], self.sampler
        shared = [(o.branches, o.stop, o.jacobi, o.tolerance, o.logprobs) for o in options]
        if any(s != shared[0] for s in shared):
            raise UserError(
                "all rows of a session must have the same stop, jacobi, tolerance, logprobs and kinds of guidance; "
                "give them the same values"
            )
        if any(o.image_first and o.max_images == 0 for o in options):
            raise UserError("image_first asks for an image, but max_images is 0; change one of them")
        solver = Jacobi(int(one.jacobi), one.tolerance) if one.jacobi else sampler.deep
        chunk = min(solver.chunk, sampler.model.cfg.tokens)
        return Program(sampler.model, sampler.ids, sampler.skips, one.branches, chunk, solver.tolerance)

    @property
    def to_write(self) -> np.ndarray:
        """(rows,): largest number of positions that each row can write in a turn, idle rows included."""
        return np.array([o.max_tokens for o in self.options])

    @property
    def computed(self) -> np.ndarray:
        """(rows,): positions that either stream ran for each row, without those of its guidance branches."""
        return np.asarray(self.program.first(self.rows.computed))[: self.size]

    def read(self, documents: Many[Document | None], room: int | np.ndarray = 0) -> None:
        """Read one more document in each row; None or an empty one: the row reads nothing.

        `room`: positions to keep free after it, for all rows or one number for each. If `max_tokens` cut off an image
        in a row that reads more, the unfinished image is removed first; if it lacks only its <|vision_end|>, that token
        is added instead. Raises DocumentError for a document that does not fit the model; nothing has
        changed then.
        """
        padded = [d or [] for d in documents] + [[]] * (len(self.options) - self.size)
        encoded = []
        for i, document in enumerate(padded):
            try:
                require_no_image_tokens(document)
                encoded.append(self.encode(document, i))
            except DocumentError as error:
                raise DocumentError(str(error), i) from None
        lengths = np.array([len(own["tokens"]) for own, *_ in encoded])
        cut = np.where(lengths > 0, self._open(), 0)
        self._make_room(lengths, room, cut)
        self._take_back(cut)
        for lane, features in enumerate(zip(*encoded, strict=True)):
            if any(len(f["tokens"]) for f in features):
                self._read(lane, features)

    def encode(self, document: Document, index: int = 0) -> list[dict[str, np.ndarray]]:
        """The features that row `index` and then each of its branches would read for a document. Raises DocumentError.

        After an image that lacks only its <|vision_end|>, all of them read that token first.
        """
        whole = int(self.rows.in_image[index]) == self.sampler.model.cfg.tokens - 1
        end = [Text("<|vision_end|>")] if whole and not is_empty(document) else []
        lanes = {"context": document, "images": [p for p in document if isinstance(p, Image)], "bare": []}
        return [
            self.sampler.encoder(end + lanes[kind] or [Text("")], closed=False)
            for kind in ("context", *self.program.branches)
        ]

    def settle(self) -> None:
        """Remove images that `max_tokens` cut off, so that no row is within an image."""
        self._take_back(self._open())

    def _take_back(self, cut: np.ndarray) -> None:
        """Forget the last `cut` (rows,) positions."""
        if cut.any():
            self.rows = self.sampler.run(row.take_back, self.rows, cut.astype(np.int32))

    def _open(self) -> np.ndarray:
        """(rows,): positions of the unfinished image that a row is within, <|vision_start|> included; 0: none."""
        inside, last = np.asarray(self.rows.in_image), np.asarray(self.rows.token)
        begun = (inside < 0) & (last == self.sampler.ids.vision_start)
        partial = (inside >= 0) & (inside < self.sampler.model.cfg.tokens - 1)
        return np.where(begun, 1, np.where(partial, inside + 2, 0))

    def _read(self, lane: int, features: tuple[dict[str, np.ndarray], ...]) -> None:
        """Read the features of all rows into the cache rows `lane`: 0 for the rows' own, then the branches."""
        lengths = np.array([len(f["tokens"]) for f in features], np.int32)
        ends = np.array([f["positions"].max(initial=-1) + 1 for f in features], np.int32)
        images, patches = (max(len(f.get(name, ())) for f in features) for name in ("latents", "patches"))
        shape = Shape(len(features), bucket(lengths.max()), power(images), bucket(patches) if patches else 0)
        given = self.sampler.place((collate(list(features), shape), lengths, ends))
        self.rows = self._call(steps.read, self.rows, given[0], lane, *given[1:])

    def write(self, options: SampleOptions | None = None) -> list[Document]:
        """Write an answer in each row, until it ends itself or has `max_tokens` positions. `options`: of this turn on.

        An image that `max_tokens` cut off in the turn before is continued, and belongs to the answer that finishes it.
        Raises DocumentError for a row that has read nothing, and UserError as `choose` does.
        """
        events: list[list[Event]] = [[] for _ in range(self.size)]
        for event in self.stream(options, every=None):
            events[event.choice].append(event)
        return [as_document(of_row) for of_row in events]

    def stream(self, options: SampleOptions | None = None, every: int | None = 4) -> Iterator[Event]:
        """Like `write`, but yields events every `every` positions (None: at the end). `Event.choice` is the row."""
        return self._events(self.advance(options, every))

    def _events(self, progress: Iterator[np.ndarray]) -> Iterator[Event]:
        """The events of all rows, made each time that `progress` yields the positions written, (rows,)."""
        sampler, begun = self.sampler, np.asarray(self.rows.begun)
        N, options = sampler.model.cfg.tokens, self.options[0]
        answers = [Answer(i, sampler.tokenizer, N, sampler.ids.end, options.stop) for i in range(self.size)]
        for counts in progress:
            tokens, done = np.asarray(self.rows.tokens), np.asarray(self.rows.done)
            records = [tokens[i, : begun[i] + count] for i, count in enumerate(counts)]
            whole = [answer.whole(record) for answer, record in zip(answers, records, strict=True)]
            pictures = sampler.pictures(self.rows.u, whole, options.calibrated)
            for i, answer in enumerate(answers):
                yield from answer.read(records[i], bool(done[i]), pictures[i])

    def advance(self, options: SampleOptions | None = None, every: int | None = 8) -> Iterator[np.ndarray]:
        """Like `write`, but yields the number of positions that each row has written, (rows,), every `every` steps."""
        self._begin(options)
        return self.go_on(every)

    def go_on(self, every: int | None = 8) -> Iterator[np.ndarray]:
        """The rest of this turn; yields as `advance` does. Warns at its end if `max_tokens` cut off images."""
        stop, longest = self.options[0].stop, int(self.to_write.max())
        while not np.asarray(self.rows.done)[: self.size].all():
            self.rows = self._call(steps.write, self.rows, jnp.int32(1 if stop else (every or longest)))
            if stop:
                self._stop(stop)
            yield np.asarray(self.rows.count)[: self.size]
        if cut := int((self._open()[: self.size] > 0).sum()):
            most, image = self.to_write.max(), self.sampler.model.cfg.tokens + 2
            log.warning(
                "%d of %d answers end within an image: max_tokens is %d, an image takes %d", cut, self.size, most, image
            )

    def choose(self, options: SampleOptions) -> None:
        """Set the options of all rows for the turns to come. Raises UserError if they need other guidance branches."""
        if options.branches != self.program.branches:
            raise UserError(
                "guidance and image guidance cannot be switched on or off within a session, because the branch of each "
                "must read everything from the start; begin a new session"
            )
        several = [options.sized(self.sampler.model.cfg.tokens)] * len(self.options)
        self.program, self.options = self._program(several), several

    def _begin(self, options: SampleOptions | None) -> None:
        """Begin a turn: check that each row can write, make room, and start an empty record. Raises UserError."""
        if options is not None:
            self.choose(options)
        has_read = np.asarray(self.program.first(self.rows.computed)) > 0
        if not all(some or o.image_first for some, o in zip(has_read[: self.size], self.options, strict=False)):
            raise DocumentError("a prompt is empty; give some text or an image")
        within = self._open()
        if any(o.max_images == 0 for o, open in zip(self.options, within, strict=True) if open):
            raise DocumentError(
                "an image is not finished, but max_images is 0; set max_images to at least 1, or read a new turn, "
                "which drops the unfinished image"
            )
        self._make_room(np.zeros(len(within), int), self.to_write)
        begun, idle = np.maximum(within - 1, 0).astype(np.int32), np.arange(len(within)) >= self.size
        controls = Controls.of(self.options, self.program.branches, within > 0)
        room = bucket(self.to_write.max() + begun.max())
        fresh = self.sampler.run(row.new_turn, self.rows, controls, room, begun, idle)
        self.rows = self.rows.replace(**fresh)

    def _stop(self, strings: tuple[str, ...]) -> None:
        """End the rows whose recorded tokens contain one of the strings within a run of text."""

        def found(tokens: np.ndarray) -> bool:
            texts = (self.sampler.tokenizer.decode(run, skip_special_tokens=True) for run in text_runs(tokens))
            return any(s in text for text in texts for s in strings)

        ended = np.array([found(tokens) for tokens in np.asarray(self.rows.tokens)])
        self.rows = self.rows.replace(done=self.rows.done | self.sampler.place(ended))

    def fork(self, indices: Many[int] | np.ndarray, seeds: Many[int], rows: int = 0) -> "Session":
        """A session whose row i continues this session's row indices[i] with seeds[i]; nothing is run again.

        `rows`: smallest size of the new batch.
        """
        spare = _spare(self.sampler, len(indices), rows)
        taken = np.array([*indices, *[indices[-1]] * spare])
        state = self.sampler.run(row.take, self.rows, taken, _seeds(seeds, spare))
        return Session(self.sampler, [self.options[i] for i in indices], seeds, rows, state)

    def _make_room(self, reading: np.ndarray, writing: int | np.ndarray, less: np.ndarray | int = 0) -> None:
        """Grow the caches for `reading` (rows,) more positions and `writing` positions after those.

        `less` (rows,): positions that will be removed first. Raises DocumentError if a row exceeds `max_positions`.
        """
        begin = np.asarray(self.program.first(self.rows.caches.length)) - less  # no branch has read more
        end, most = begin + reading + writing, self.sampler.max_positions
        longest = int(np.argmax(end))
        if end[longest] > most:
            prompt = int((begin + reading)[longest])
            raise DocumentError(
                f"a prompt of {prompt} positions and {end[longest] - prompt} to generate exceed the {most} that the "
                f"model was made for; shorten the prompt or generate less",
                longest,
            )
        # A read writes up to a bucket of padding after every row, a step up to `jacobi` positions.
        capacity = bucket(max(begin.max() + bucket(reading.max()), end.max() + self.program.jacobi))
        if capacity > self.rows.caches.capacity:
            self.rows = self.sampler.run(row.with_room, self.rows, capacity)

    def _call(self, compiled: Any, rows: Rows, *arguments: Any) -> Rows:
        """Run `steps.read` or `steps.write` with this session's program."""
        return self.sampler.run_step(self.program, compiled, rows, *arguments)


def _seeds(seeds: Many[int], spare: int) -> np.ndarray:
    """Seeds modulo 2^32, followed by zeros for the spare rows."""
    return np.array([int(seed) % 2**32 for seed in seeds] + [0] * spare, np.uint32)


def _spare(sampler: Runtime, size: int, rows: int) -> int:
    """Number of idle rows that bring `size` rows to at least `rows`, and to a multiple of the mesh's row shards."""
    spare = max(rows - size, 0)
    return spare + -(size + spare) % sharding.row_shards(sampler.mesh)
