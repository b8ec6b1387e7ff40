"""Generation: documents in, documents out. What the model writes enters both streams' caches and is never run again.

A `Session` is a batch of conversations: it reads documents, writes answers, reads on, forks. Its rows step together, each
in its own mode (writing text, writing an image, done). A row starts an image when <|vision_start|> comes and returns to
text after the image's last token.
"""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax import config as configs
from starflow2_jax import sharding
from starflow2_jax.checkpoints import CheckpointDirectory, CheckpointError, abstract
from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.data.pipeline import Encoder, Shape, collate
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.inversion import Schedule
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, for_sampling, init_params, split
from starflow2_jax.sampling import rows as row
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.rows import Controls, Rows, SampleOptions
from starflow2_jax.sampling.steps import Program
from starflow2_jax.stages import STAGES

BUCKET = 32  # prompts and caches are as long as this times a power of two, so that few shapes are compiled
AS_TRAINED = SampleOptions()
log = logging.getLogger(__name__)


class Sampler:
    """A model, its parameters, tokenizer and codec. `skips`: whether the stage that made the parameters opened them."""

    schedule: Schedule | None = None  # how the shallow flow is inverted; None: token by token
    noise: float = 0.0  # deviation of the noise that images had in training, in their units

    def __init__(
        self, model: Pretzel, params: dict, tokenizer, codec, skips: bool = True, max_positions: int = 4096, mesh=None
    ):
        scanned = model.cfg.deep.scan  # as trained
        self.model = Pretzel(for_sampling(model.cfg))
        self.params = separate_layers(params) if scanned else params
        self.tokenizer, self.codec, self.skips = tokenizer, codec, skips
        self.max_positions = max_positions
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.encoder = Encoder(tokenizer, codec, model.cfg.vlm.vision)
        self.ids = TokenIds.of(tokenizer)
        self.programs: set[tuple] = set()  # what was compiled so far, by program and shapes

    @classmethod
    def restore(cls, folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None) -> "Sampler":
        """From a checkpoint directory alone, its latest step. Raises CheckpointError.

        `mesh`: rows and parameters lie on it as in training; None: rows spread over all devices. `dtype`: of matrices and
        caches, "float32" or "bfloat16"; None: as in the config.
        """
        checkpoints = CheckpointDirectory(folder)
        config, number = checkpoints.config(), checkpoints.require_latest()
        cfg = configs.pretzel(config)
        model = Pretzel(in_type(cfg, dtype) if dtype else cfg)
        mesh = mesh or sharding.make_mesh(fsdp=1, tensor=1)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        frozen, trainable = (abstract(tree, mesh) for tree in split(shapes))
        stage = STAGES[checkpoints.meta(number)["stage"]]
        if set(stage.trains) <= set(frozen):
            raise CheckpointError(f"{folder} has only pretrained its VLM so far; train on before sampling")
        params = checkpoints.restore(number, {"params": trainable})["params"] | checkpoints.restore_frozen(frozen)
        moving = {name: trainable[name] for name in stage.trains}
        if checkpoints.has(number, "ema"):
            params |= checkpoints.restore(number, {"ema": moving})["ema"]
        if dtype:
            params = weights_in_type(params, dtype)
        for name in list(params):  # one by one: no more than one group is in memory twice
            params[name] = separate_layers(params.pop(name))
        codec, tokenizer = checkpoints.codec(), checkpoints.tokenizer()
        model = Pretzel(for_sampling(model.cfg))
        sampler = cls(model, params, tokenizer, codec, stage.skips, config.max_positions, mesh)
        sampler.schedule = checkpoints.inversion(model.cfg.shallow_blocks)
        sampler.noise = config.noise
        return sampler

    def place(self, tree):
        """Host arrays that lead with rows, on the mesh: over its data and fsdp axes."""
        if self.mesh.size == 1:
            return tree  # the compiled function that takes them is faster at it
        return jax.device_put(tree, sharding.row_shardings(tree, self.mesh))

    def session(self, options: SampleOptions | Many[SampleOptions], seeds: Many[int]) -> "Session":
        """One empty conversation a seed."""
        return Session(self, options, seeds)

    def generate(
        self,
        prompts: list[Document],
        options: SampleOptions | Many[SampleOptions] = AS_TRAINED,
        seed: int = 0,
        samples: int = 1,
    ) -> list[Document]:
        """Continue each prompt `samples` times, until the answer ends itself or `max_tokens` are written.

        Returns what was written, prompts left out, the samples of a prompt side by side. Answer i is drawn with
        seed + i: the same alone, in any batch, on any mesh. A prompt is read once for all of its samples. Raises
        DocumentError for a prompt that does not fit the model.
        """
        if not prompts:
            return []
        seeds = seed + np.arange(len(prompts) * samples)
        session = self.session(options, seeds[::samples])
        session.read(prompts, room=session.longest)
        if samples > 1:
            session = session.fork(np.repeat(np.arange(len(prompts)), samples), seeds)
        return session.write()

    def decode(self, u: jax.Array) -> np.ndarray:
        """u (n, N, D) -> pixels (n, height, width, C), not clipped."""
        latents = _decode(self.model, self.schedule, self.params, u)
        h, w = self.model.cfg.grid
        return np.asarray(self.codec.decode(latents.reshape(-1, h, w, latents.shape[-1])))


@partial(jax.jit, static_argnums=(0, 1))
def _decode(model: Pretzel, schedule: Schedule | None, params, u):
    return model.apply({"params": params}, u, schedule, method=Pretzel.decode)


class Session:
    """A batch of conversations with one sampler. What was read or written stays in the caches of both streams.

    `options`: of all rows, or one of each; rows of one session share `stop`, `jacobi`, `tolerance` and which guidance
    there is. Row i is a function of what it reads and of seeds[i], and of nothing else in the batch.
    """

    def __init__(self, sampler: Sampler, options: SampleOptions | Many[SampleOptions], seeds: Many[int]):
        self.sampler, self.size = sampler, len(seeds)
        self.options = [options] * self.size if isinstance(options, SampleOptions) else list(options)
        spare = -self.size % sharding.spread(sampler.mesh)  # rows that only fill up the mesh
        self.options += self.options[-1:] * spare
        self.program = self._program()
        branches = self.program.branches
        with jax.set_mesh(sampler.mesh):
            self.rows = row.empty_rows(sampler.model, _seeds(seeds, spare), branches)

    def _program(self) -> Program:
        one, sampler = self.options[0], self.sampler
        shared = [(o.branches, o.stop, o.jacobi, o.tolerance) for o in self.options]
        if any(s != shared[0] for s in shared):
            raise ValueError("the rows of a session share stop, jacobi, tolerance and the kinds of guidance")
        filtered = any(o.top_k or o.top_p < 1 for o in self.options)
        jacobi = min(one.jacobi, sampler.model.cfg.tokens)
        return Program(sampler.model, sampler.ids, sampler.skips, one.branches, filtered, jacobi, one.tolerance)

    @property
    def longest(self) -> int:
        """Positions that any row may yet write."""
        return max(o.max_tokens for o in self.options)

    @property
    def computed(self) -> np.ndarray:
        """(rows,): positions that were ever run for each row, in either stream; its branches for guidance not counted."""
        return np.asarray(self.program.first(self.rows.computed))[: self.size]

    def read(self, documents: list[Document | None], room: int = 0) -> None:
        """Read on, a document a row (None or empty: nothing). `room`: positions to keep free behind it.

        Raises DocumentError for a document that does not fit the model; then nothing has been read.
        """
        documents = [d or [] for d in documents] + [[]] * (len(self.options) - self.size)
        lanes = {
            "context": documents,
            "images": [[p for p in d if isinstance(p, Image)] for d in documents],
            "bare": [],
        }
        encoded = [
            [self.sampler.encoder(d or [Text("")], closed=False) for d in lanes[kind]]
            for kind in ("context", *self.program.branches)
        ]
        self._make_room(max(len(f["tokens"]) for f in encoded[0]), room)
        for lane, features in enumerate(encoded):
            if any(len(f["tokens"]) for f in features):
                self._read(lane, features)

    def _read(self, lane: int, features: list[dict]) -> None:
        lengths = np.array([len(f["tokens"]) for f in features], np.int32)
        ends = np.array([f["positions"].max(initial=-1) + 1 for f in features], np.int32)
        images, patches = (max(len(f.get(name, ())) for f in features) for name in ("latents", "patches"))
        shape = Shape(len(features), bucket(lengths.max()), power(images), bucket(patches) if patches else 0)
        given = self.sampler.place((collate(features, shape), lengths, ends))
        self.rows = self._call(steps.read, self.rows, given[0], lane, *given[1:])

    def write(self, options: SampleOptions | None = None) -> list[Document]:
        """Each row's answer, until it ends itself or its `max_tokens` are written. `options`: of this turn."""
        for _ in self.stream(options, every=None):
            pass
        return self.written()

    def stream(self, options: SampleOptions | None = None, every: int | None = 8) -> Iterator[np.ndarray]:
        """`write`, stopping every so many steps: yields how many positions each row has written, (rows,)."""
        self._begin(options)
        return self.go_on(every)

    def go_on(self, every: int | None = 8) -> Iterator[np.ndarray]:
        """The rest of this turn."""
        stop = self.options[0].stop
        while not np.asarray(self.rows.done)[: self.size].all():
            self.rows = self._call(steps.write, self.rows, jnp.int32(1 if stop else (every or self.longest)))
            if stop:
                self._stop(stop)
            yield np.asarray(self.rows.count)[: self.size]

    def _begin(self, options: SampleOptions | None) -> None:
        if options is not None:
            if options.branches != self.program.branches:
                raise ValueError("a session keeps its kinds of guidance: what they compare with has read along")
            self.options = [options] * len(self.options)
            self.program = self._program()
        asked = np.asarray(self.program.first(self.rows.computed)) > 0
        if not all(some or o.image_first for some, o in zip(asked[: self.size], self.options, strict=False)):
            raise DocumentError("a prompt is empty; give some text or an image")
        self._make_room(0, self.longest)
        T, B = bucket(self.longest), len(self.options)
        idle = np.arange(B) >= self.size
        controls = Controls.of(self.options, self.program.branches)
        with jax.set_mesh(self.sampler.mesh):
            self.rows = self.rows.replace(**row.new_turn(controls, T, self.sampler.codec.channels, idle))

    def _stop(self, strings: tuple[str, ...]) -> None:
        """End the rows whose text holds one of the strings."""
        tokens = np.asarray(self.rows.tokens)
        texts = [self.sampler.tokenizer.decode(t[t >= 0], skip_special_tokens=True) for t in tokens]
        found = np.array([any(s in text for s in strings) for text in texts])
        self.rows = self.rows.replace(done=self.rows.done | self.sampler.place(found))

    def fork(self, indices: Many[int], seeds: Many[int]) -> "Session":
        """A session whose row i goes on from this one's row indices[i], with a seed of its own; nothing is run again."""
        forked = Session(self.sampler, [self.options[i] for i in indices], seeds)
        spare = [indices[-1]] * (len(forked.options) - len(indices))
        seeds = _seeds(seeds, len(spare))
        with jax.set_mesh(self.sampler.mesh):
            forked.rows = row.take(self.rows, np.array([*indices, *spare]), seeds)
        return forked

    def written(self) -> list[Document]:
        """What each row has written in this turn; an image that is not whole is left out."""
        tokens, u = np.asarray(self.rows.tokens)[: self.size], self.rows.u
        N = self.sampler.model.cfg.tokens
        runs = [np.flatnonzero(r == -1) for r in tokens]
        places = [(i, c) for i, run in enumerate(runs) for c in run[: len(run) // N * N : N]]
        images: list[dict[int, np.ndarray]] = [{} for _ in tokens]
        if places:
            at, columns = np.array(places).T
            pixels = self.sampler.decode(u[at[:, None], columns[:, None] + np.arange(N)])
            for (i, c), image in zip(places, pixels, strict=True):
                images[i][c] = image
        return [self._document(r, found) for r, found in zip(tokens, images, strict=True)]

    def _document(self, tokens: np.ndarray, images: dict[int, np.ndarray]) -> Document:
        parts: Document = []
        text: list[int] = []

        def flush():
            if words := self.sampler.tokenizer.decode(text, skip_special_tokens=True):
                parts.append(Text(words, predict=True))
            text.clear()

        for column, token in enumerate(tokens):
            if token >= 0:
                text.append(int(token))
            elif column in images:
                flush()
                parts.append(Image(images[column], generate=True))
        flush()
        return _before(parts, self.options[0].stop)

    def _make_room(self, reading: int, writing: int) -> None:
        """Caches for `reading` more positions and `writing` behind them. Raises DocumentError where they are too many."""
        used, most = int(np.asarray(self.rows.caches.length).max()), self.sampler.max_positions
        if used + reading + writing > most:
            raise DocumentError(
                f"a prompt of {used + reading} positions and {writing} to generate exceed the {most} that the model was "
                "made for; shorten the prompt or generate less"
            )
        slots = bucket(used + max(bucket(reading), reading + writing + self.program.jacobi))
        if slots > self.rows.caches.slots:
            with jax.set_mesh(self.sampler.mesh):
                self.rows = row.with_room(self.rows, slots)

    def _call(self, compiled, rows: Rows, *arguments) -> Rows:
        shapes = tuple(x.shape for x in jax.tree.leaves((rows, arguments)) if hasattr(x, "shape"))
        if (key := (compiled.__name__, self.program, shapes)) not in self.sampler.programs:
            self.sampler.programs.add(key)
            slots = rows.caches.slots
            log.info("compiling %s for %d rows with room for %d positions", compiled.__name__, len(rows.done), slots)
        return compiled(self.program, self.sampler.params, rows, *arguments)


def _seeds(seeds: Many[int], spare: int) -> np.ndarray:
    """Any integers as 32 bits, and zeros for the spare rows."""
    return np.array([*seeds, *[0] * spare], np.int64).astype(np.uint32)


def bucket(length: int) -> int:
    """BUCKET times the least power of two that holds `length`."""
    return BUCKET * power(-(-length // BUCKET))


def power(count: int) -> int:
    """The least power of two that is not below `count`, at least 1."""
    return 1 << max(int(count) - 1, 0).bit_length()


def _before(parts: Document, stop: tuple[str, ...]) -> Document:
    """The parts up to the first of the stop strings."""
    for i, part in enumerate(parts):
        cuts = [part.text.index(s) for s in stop if isinstance(part, Text) and s in part.text]
        if cuts:
            return parts[:i] + ([Text(part.text[: min(cuts)], predict=True)] if min(cuts) else [])
    return parts


def in_type(cfg: PretzelConfig, dtype: str) -> PretzelConfig:
    """The same model with its matrix products and caches in another type."""
    vision = cfg.vlm.vision and replace(cfg.vlm.vision, dtype=dtype)
    vlm = replace(cfg.vlm, dtype=dtype, vision=vision)
    return replace(cfg, vlm=vlm, shallow=replace(cfg.shallow, dtype=dtype), deep=replace(cfg.deep, dtype=dtype))


def weights_in_type(params: dict, dtype: str) -> dict:
    """Stacks and embeddings in `dtype`; norms and what makes the Gaussians stay as they are."""

    def leaf(path, x):
        name = sharding.path_name(path)
        matrix = "/layers" in name and name.endswith("kernel")
        return x.astype(dtype) if matrix or name.endswith("embedding") else x

    return jax.tree_util.tree_map_with_path(leaf, params)
