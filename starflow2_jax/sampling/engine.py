"""Generation: documents in, documents out. What the model writes enters both streams' caches and is never run again.

A batch of rows steps together; each row is in its own mode (writing text, writing an image, done). A row starts an image
when <|vision_start|> comes and returns to text after the image's last token.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax import config as configs
from starflow2_jax import sequence, sharding
from starflow2_jax.checkpoints import CheckpointDirectory, CheckpointError, abstract
from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.data.pipeline import Encoder, Shape, collate
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.inversion import Schedule
from starflow2_jax.models.pretzel import Caches, Output, Pretzel, init_params, split
from starflow2_jax.sampling.guidance import mix_gaussians
from starflow2_jax.sequence import Step
from starflow2_jax.stages import STAGES

BUCKET = 32  # prompt lengths are rounded up to a multiple, so that few shapes are compiled


@dataclass(frozen=True)
class SampleOptions:
    temperature: float = 1.0  # of text; 0: the most likely token
    image_temperature: float = 1.0  # tau in u = mu + tau sigma z
    guidance: float = 0.0  # w >= 0 of the Gaussian mixing, against the image without any context
    max_tokens: int = 128  # positions to generate, image tokens included
    image_first: bool = False  # begin with an image


@struct.dataclass
class _Rows:
    """What one step needs to know of each row."""

    token: jax.Array  # (B,) the position about to be fed
    u: jax.Array  # (B, D)
    in_image: jax.Array  # (B,) which image token is fed, -1: none
    position: jax.Array  # (B,) rotary offset of the next text position, or of the image being written
    done: jax.Array  # (B,) bool
    caches: Caches
    bare: Caches | None  # of the images alone, without any context: what guidance compares with


class Sampler:
    """A model, its parameters, tokenizer and codec. `skips`: whether the stage that made the parameters opened them."""

    schedule: Schedule | None = None  # how the shallow flow is inverted; None: token by token

    def __init__(
        self, model: Pretzel, params: dict, tokenizer, codec, skips: bool = True, max_positions: int = 4096, mesh=None
    ):
        self.model, self.params, self.tokenizer, self.codec, self.skips = model, params, tokenizer, codec, skips
        self.max_positions = max_positions
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.encoder = Encoder(tokenizer, codec, model.cfg.vlm.vision)
        self.ids = TokenIds.of(tokenizer)

    @classmethod
    def restore(cls, folder: str | Path) -> "Sampler":
        """From a checkpoint directory alone, its latest step, rows spread over all devices. Raises CheckpointError."""
        checkpoints = CheckpointDirectory(folder)
        config, number = checkpoints.config(), checkpoints.require_latest()
        model = Pretzel(configs.pretzel(config))
        mesh = sharding.make_mesh(fsdp=1, tensor=1)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        frozen, trainable = (abstract(tree, mesh) for tree in split(shapes))
        stage = STAGES[checkpoints.meta(number)["stage"]]
        if set(stage.trains) <= set(frozen):
            raise CheckpointError(f"{folder} has only pretrained its VLM so far; train on before sampling")
        params = checkpoints.restore(number, {"params": trainable})["params"] | checkpoints.restore_frozen(frozen)
        moving = {name: trainable[name] for name in stage.trains}
        if checkpoints.has(number, "ema"):
            params |= checkpoints.restore(number, {"ema": moving})["ema"]
        sampler = cls(
            model, params, checkpoints.tokenizer(), checkpoints.codec(), stage.skips, config.max_positions, mesh
        )
        sampler.schedule = checkpoints.inversion(model.cfg.shallow_blocks)
        return sampler

    def generate(
        self, prompts: list[Document], options: SampleOptions = SampleOptions(), seed: int = 0
    ) -> list[Document]:
        """Continue each prompt until it ends itself or `max_tokens` are written. Returns what was written, prompts left out.

        Row i is a function of its prompt and of (seed, i): of nothing else in the batch. Raises DocumentError for a prompt
        that does not fit the model.
        """
        return self._documents(*self.write(prompts, options, seed))

    def write(
        self, prompts: list[Document], options: SampleOptions = SampleOptions(), seed: int = 0
    ) -> tuple[np.ndarray, jax.Array]:
        """What `generate` writes, raw: tokens (B, max_tokens), -1 for an image token, -2 after the end; u (B, max_tokens, D)."""
        features = [self.encoder(prompt, closed=False) for prompt in prompts]
        if options.image_first:
            features = [_open_image(f, self.ids.vision_start) for f in features]
        if not all(len(f["tokens"]) for f in features):
            raise DocumentError("a prompt is empty; give some text or an image")
        longest = max(len(f["tokens"]) for f in features)
        if longest + options.max_tokens > self.max_positions:
            raise DocumentError(
                f"a prompt of {longest} positions and {options.max_tokens} to generate exceed the {self.max_positions} that the "
                "model was made for; shorten the prompt or generate less"
            )
        room = -(-longest // BUCKET) * BUCKET
        spare = -len(features) % self.mesh.size  # rows that only fill up the mesh
        features += features[-1:] * spare
        shape = Shape(
            len(features),
            room,
            max(1, max(len(f["latents"]) for f in features)),
            max(len(f.get("patches", ())) for f in features),
        )
        ends = np.array([f["positions"].max() + 1 for f in features], np.int32)
        lengths = np.array([len(f["tokens"]) for f in features], np.int32)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(features)))
        rows = jax.device_put((collate(features, shape), lengths, ends, keys), sharding.batch_sharding(self.mesh))
        static = replace(options, guidance=float(options.guidance > 0))  # how much of it needs no new program
        tokens, u = _generate(self.model, self.ids, self.skips, static, self.params, *rows, options.guidance)
        return np.asarray(tokens)[: len(prompts)], u[: len(prompts)]

    def _documents(self, tokens: np.ndarray, u: jax.Array) -> list[Document]:
        N = self.model.cfg.tokens
        runs = [np.flatnonzero(row == -1) for row in tokens]
        whole = [run[: len(run) // N * N : N] for run in runs]  # an image cut off by max_tokens is left out
        places = [(i, c) for i, starts in enumerate(whole) for c in starts]
        images: list[dict[int, np.ndarray]] = [{} for _ in tokens]
        if places:
            rows, columns = np.array(places).T
            pixels = self.decode(u[rows[:, None], columns[:, None] + np.arange(N)])
            for (i, c), image in zip(places, pixels, strict=True):
                images[i][c] = image
        return [self._document(row, found) for row, found in zip(tokens, images, strict=True)]

    def _document(self, row: np.ndarray, images: dict[int, np.ndarray]) -> Document:
        parts: Document = []
        text: list[int] = []

        def flush():
            if words := self.tokenizer.decode(text, skip_special_tokens=True):
                parts.append(Text(words, predict=True))
            text.clear()

        for column, token in enumerate(row):
            if token >= 0:
                text.append(int(token))
            elif column in images:
                flush()
                parts.append(Image(images[column], generate=True))
        flush()
        return parts

    def decode(self, u: jax.Array) -> np.ndarray:
        """u (n, N, D) -> pixels (n, height, width, C), not clipped."""
        latents = _decode(self.model, self.schedule, self.params, u)
        h, w = self.model.cfg.grid
        return np.asarray(self.codec.decode(latents.reshape(-1, h, w, latents.shape[-1])))


def _open_image(features: dict[str, np.ndarray], vision_start: int) -> dict[str, np.ndarray]:
    """The same prompt with <|vision_start|> behind it."""
    end = features["positions"].max() + 1 if len(features["tokens"]) else 0
    extra = {
        "tokens": np.array([vision_start], np.int32),
        "modality": np.array([sequence.TEXT], np.int32),
        "text_weight": np.zeros(1, np.float32),
        "positions": sequence.text_positions(end, 1).astype(np.int32),
    }
    return features | {name: np.concatenate([features[name], more]) for name, more in extra.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _decode(model: Pretzel, schedule: Schedule | None, params, u):
    return model.apply({"params": params}, u, schedule, method=Pretzel.decode)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Pretzel, ids: TokenIds, skips: bool, options: SampleOptions, params, batch, lengths, ends, keys, weight
):
    """Prefill, then step until all rows are done. `options.guidance` only says whether there is any; `weight` how much.

    Returns tokens (B, T) (-1: an image token, -2: nothing) and u (B, T, D).
    """
    cfg = model.cfg
    B, S = batch.tokens.shape
    T, N, D = options.max_tokens, cfg.tokens, cfg.channels

    def apply(inputs, caches) -> Output:
        return model.apply({"params": params}, inputs, caches, skips=skips)

    def empty(slots) -> Caches:
        return model.apply({"params": params}, B, slots, method=Pretzel.empty_caches)

    # Everything of the prompt but its last position is prefilled; the last one is the first step's input.
    caches = apply(batch, empty(S + T + 1)).caches
    last = lengths - 1
    at = jnp.arange(B), last
    rows = _Rows(
        token=batch.tokens[at],
        u=jnp.zeros((B, D)),
        in_image=jnp.full(B, -1),
        position=ends - 1,
        done=jnp.zeros(B, bool),
        caches=caches.rewind(last),
        bare=empty(N + 1) if options.guidance else None,
    )
    written = jnp.full((B, T), -2, jnp.int32), jnp.zeros((B, T, D))

    def unfinished(carry):
        index, rows, _ = carry
        return (index < T) & ~jnp.all(rows.done)

    def body(carry):
        index, rows, (tokens, us) = carry
        rows, token, u = _step(model, ids, options, apply, params, rows, keys, index, weight)
        return index + 1, rows, (tokens.at[:, index].set(token), us.at[:, index].set(u))

    _, _, written = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), rows, written))
    return written


def _step(model, ids, options, apply, params, rows: _Rows, keys, index, weight):
    """Feed each row's position, draw its next one. Returns the new rows and what was drawn: token (B,), u (B, D)."""
    cfg = model.cfg
    N, (h, w) = cfg.tokens, cfg.grid
    image_in = rows.in_image >= 0
    slot = jnp.maximum(rows.in_image, 0)
    place = jnp.where(image_in[:, None], jnp.stack([0 * slot, slot // w, slot % w], -1), 0)
    feed = Step(
        tokens=jnp.where(image_in, ids.image, rows.token)[:, None],
        modality=jnp.where(image_in, sequence.FLOW, sequence.TEXT)[:, None],
        positions=(rows.position[:, None] + place)[:, None],
        u=rows.u[:, None],
    )
    output = apply(feed, rows.caches)
    caches = output.caches.rewind(jnp.where(rows.done, rows.caches.length, output.caches.length))
    gaussian = output.mean[:, 0], output.scale[:, 0]

    starts = ~image_in & (rows.token == ids.vision_start)  # the position fed was <|vision_start|>: an image follows
    bare = rows.bare
    if options.guidance:
        # The same positions with nothing before <|vision_start|>, counted from 0; rewound at each image's start.
        bare = bare.rewind(jnp.where(image_in, bare.length, 0))
        alone = feed.replace(positions=(jnp.where(image_in, 1, 0)[:, None] + place)[:, None])
        alone_out = apply(alone, bare)
        bare = alone_out.caches
        gaussian = mix_gaussians(gaussian, (alone_out.mean[:, 0], alone_out.scale[:, 0]), weight)

    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    noise = jax.vmap(lambda k: jax.random.normal(k, (cfg.channels,)))(keys)
    u = gaussian[0] + options.image_temperature * gaussian[1] * noise
    logits = model.apply({"params": params}, output.text[:, 0], method=Pretzel.text_logits)
    logits = logits.at[:, jnp.array([ids.image, ids.vision_end, ids.pad])].set(-jnp.inf)  # never drawn as text
    token = _draw(logits, options.temperature, keys)

    image_out = starts | (image_in & (rows.in_image < N - 1))
    ends_image = image_in & (rows.in_image == N - 1)
    token = jnp.where(ends_image, ids.vision_end, token)
    stop = ~image_out & (token == ids.end)
    position = jnp.where(starts | ~image_in, rows.position + 1, rows.position)
    position = jnp.where(ends_image, rows.position + max(h, w), position)
    done = rows.done | stop
    new = _Rows(
        token=token,
        u=u,
        in_image=jnp.where(image_out, jnp.where(starts, 0, rows.in_image + 1), -1),
        position=position,
        done=done,
        caches=caches,
        bare=bare,
    )
    return new, jnp.where(done, -2, jnp.where(image_out, -1, token)), u


def _draw(logits: jax.Array, temperature: float, keys: jax.Array) -> jax.Array:
    """(B, V) -> (B,) token ids."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.vmap(jax.random.categorical)(keys, logits / temperature)
