"""The state of a batch that reads and writes: caches, outputs of the last position, and each row's options."""

import math
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Caches, Pretzel, apply
from starflow2_jax.parallel.sharding import constrain_rows

BUCKET = 32  # lengths of prompts and caches are this times a power of two, so that few shapes are compiled
WHOLE = ("max_tokens", "top_k", "max_images", "jacobi", "logprobs")  # options that are whole numbers
REALS = ("temperature", "image_temperature", "guidance", "image_guidance", "top_p", "tolerance", "repetition_penalty")
PENALTIES = ("presence_penalty", "frequency_penalty")  # options from -MOST_PENALTY to MOST_PENALTY
MOST_PENALTY = 2.0
OPTIONAL = ("max_tokens", "image_guidance", "max_images", "logprobs")  # options that may be None


@dataclass(frozen=True)
class SampleOptions:
    """How an answer is drawn.

    The rows of a batch may differ in all options but `stop`, `jacobi`, `tolerance`, `logprobs` and `branches`.

    Raises UserError for a value out of its range.
    """

    temperature: float = 1.0  # of text; 0: always take the most likely token
    image_temperature: float = 1.0  # tau in u = mu + tau sigma z
    guidance: float = (
        0.0  # weight w >= 0 against a branch without text (and images, if image_guidance is None); 0: none
    )
    max_tokens: int | None = None  # positions to write, image tokens included; None: those of two images, at least 128
    image_first: bool = False  # begin with an image
    top_k: int = 0  # draw text from the k most likely tokens; 0: from all
    top_p: float = 1.0  # draw text from the fewest tokens whose probabilities sum to this; 0: the most likely token
    image_guidance: float | None = None  # weight against a branch without text and images; see `guidance`
    linear: bool = False  # guidance by extrapolation (TarFlow) instead of Gaussian mixing (STARFlow)
    annealed: bool = False  # the guidance weight grows over the image, w (i + 1) / (N - 1)
    max_images: int | None = None  # most images of a turn, with one begun in the turn before; None: any number
    stop: tuple[str, ...] = ()  # strings that end the answer; they are not part of it
    jacobi: int = 0  # image tokens solved for at once; 1: token by token; 0: as calibrated, else token by token
    tolerance: float = 1e-3  # Jacobi passes end at this mean squared change / mean square; not used with jacobi 0
    presence_penalty: float = 0.0  # taken off the logits of tokens that the answer holds already
    frequency_penalty: float = 0.0  # taken off a token's logit as many times as the answer holds the token
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt and answer
    logprobs: int | None = (
        None  # record the log-probability of each text token and of this many likely ones; None: none
    )

    def __post_init__(self):
        for name in (*WHOLE, *REALS):
            value, least = getattr(self, name), int(name == "max_tokens")
            if value is None and name in OPTIONAL:
                continue
            kind = Integral if name in WHOLE else Real
            if not isinstance(value, kind) or not math.isfinite(value) or value < least:
                raise UserError(
                    f"{name} must be a {'whole ' if kind is Integral else ''}number of at least {least}, not {value!r}"
                )
        for name in PENALTIES:
            if not isinstance(value := getattr(self, name), Real) or not abs(float(value)) <= MOST_PENALTY:
                raise UserError(f"{name} is a number from {-MOST_PENALTY} to {MOST_PENALTY}, not {value!r}")
        if self.repetition_penalty <= 0:
            raise UserError("repetition_penalty is a number above 0; 1 changes nothing")
        if self.top_p > 1:
            raise UserError(f"top_p is a probability and must be at most 1, not {self.top_p!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))

    def sized(self, image: int) -> "SampleOptions":
        """The same options with `max_tokens` as a number, for a model whose images have `image` tokens."""
        return self if self.max_tokens else replace(self, max_tokens=max(128, 2 * (image + 2)))

    @property
    def calibrated(self) -> bool:
        """Whether images are decoded by the checkpoint's calibrated solvers, if it has any; not with `jacobi` 1."""
        return self.jacobi != 1

    @property
    def scored(self) -> int:
        """Number of tokens whose log-probabilities are recorded at each position: the drawn one and the likely ones."""
        return 0 if self.logprobs is None else 1 + self.logprobs

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that guidance needs: "images", a context without text, and "bare", an empty context."""
        if self.image_guidance is not None:
            return ("images", "bare")
        return ("bare",) if self.guidance else ()


class Controls(struct.PyTreeNode):
    """The SampleOptions of each row as arrays (B,), unless noted otherwise."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array
    scored: jax.Array  # bool: record log-probabilities
    image_temperature: jax.Array
    weights: jax.Array  # (B, branches)
    linear: jax.Array
    annealed: jax.Array
    max_tokens: jax.Array
    images_left: jax.Array  # images that the row may still begin; negative: any number
    image_next: jax.Array  # bool: the next token is <|vision_start|>

    @classmethod
    def of(
        cls, options: list[SampleOptions], branches: tuple[str, ...], inside: np.ndarray | bool = False
    ) -> "Controls":
        """The controls of a turn that begins. `inside` (B,): rows within an image, which counts as the turn's first."""

        def every(name: str, dtype: Any = np.float32) -> Any:
            return np.array([getattr(o, name) for o in options], dtype)

        weight = {"images": [o.guidance for o in options], "bare": [_bare_weight(o) for o in options]}
        weights: Any = np.array([weight[b] for b in branches], np.float32).reshape(len(branches), len(options)).T
        left: Any = np.array([-1 if o.max_images is None else o.max_images for o in options], np.int32) - inside
        return cls(
            every("temperature"),
            every("top_k", np.int32),
            every("top_p"),
            every("presence_penalty"),
            every("frequency_penalty"),
            every("repetition_penalty"),
            every("scored", bool),
            every("image_temperature"),
            weights,
            every("linear", bool),
            every("annealed", bool),
            every("max_tokens", np.int32),
            left,
            every("image_first", bool) & ~np.asarray(inside),
        )


def _bare_weight(options: SampleOptions) -> float:
    """The guidance weight against the branch "bare"."""
    return options.guidance if options.image_guidance is None else options.image_guidance


class Rows(struct.PyTreeNode):
    """B rows, each with G = 1 + branches neighbouring cache rows: cache row b G is row b's own, its branches follow."""

    caches: Caches  # of B G cache rows
    text: jax.Array  # (B, E): hidden state of the last position read, for the text head
    mean: jax.Array  # (B G, D): mean of the next image token, predicted by the last position read
    scale: jax.Array  # (B G, D): its scale
    offset: jax.Array  # (B G,) rotary offset of the next text position, or of the image being written
    token: jax.Array  # (B,) the last token read
    in_image: jax.Array  # (B,) slot of the image token that was read last; -1: the last token is of text
    drawn: jax.Array  # (B,) draws so far; together with the key it fixes the next draw
    computed: jax.Array  # (B G,) positions that either stream ran, without Jacobi's repeated passes
    passes: jax.Array  # (B,) runs of the model that this row took part in
    done: jax.Array  # (B,) bool
    key: jax.Array  # (B,) random key of the row
    controls: Controls
    tokens: jax.Array  # (B, T) the turn's record: text tokens, -1 for an image token, -2 where nothing is written
    u: jax.Array  # (B, T, D) the image tokens of the record
    likely: jax.Array  # (B, T, W) at text tokens of the record: the token itself, and the W - 1 most likely ones
    logprobs: jax.Array  # (B, T, W) their log-probabilities
    seen: jax.Array  # (B, V) bool: the text tokens that lane 0 has read
    begun: jax.Array  # (B,) image tokens at the record's start, of an image that the turn before left unfinished
    count: jax.Array  # (B,) positions written in this turn; they follow those in the record


@partial(jax.jit, static_argnums=(0, 2, 3))
def empty_rows(model: Pretzel, seeds: np.ndarray, branches: tuple[str, ...], scored: int = 0) -> Rows:
    """Rows that have read nothing, one for each seed (B,), without room in their caches. `scored`: see SampleOptions.

    Like the rows of all functions below, they lie on the mesh of `jax.set_mesh`.
    """
    B, G, cfg = len(seeds), 1 + len(branches), model.cfg

    def number(value: int) -> jax.Array:
        return jnp.full((B,), value, jnp.int32)

    rows = Rows(
        caches=apply(model, {}, B * G, 0, method=Pretzel.empty_caches),
        text=jnp.zeros((B, cfg.vlm.width), cfg.vlm.dtype),
        mean=jnp.zeros((B * G, cfg.channels)),
        scale=jnp.ones((B * G, cfg.channels)),
        offset=jnp.zeros((B * G,), jnp.int32),
        token=number(-1),
        in_image=number(-1),
        drawn=number(0),
        computed=jnp.zeros((B * G,), jnp.int32),
        passes=number(0),
        done=jnp.zeros((B,), bool),
        key=jax.vmap(jax.random.key)(seeds),
        controls=Controls.of([SampleOptions(max_tokens=1)] * B, branches),
        tokens=jnp.zeros((B, 0), jnp.int32),
        u=jnp.zeros((B, 0, cfg.channels)),
        likely=jnp.zeros((B, 0, scored), jnp.int32),
        logprobs=jnp.zeros((B, 0, scored)),
        seen=jnp.zeros((B, cfg.vlm.vocabulary), bool),
        begun=number(0),
        count=number(0),
    )
    return constrain_rows(rows)


@partial(jax.jit, static_argnums=2)
def new_turn(rows: Rows, controls: Controls, room: int, begun: np.ndarray, idle: np.ndarray) -> dict[str, Any]:
    """The fields of Rows that change when a turn begins: its controls and an empty record of `room` positions.

    The record starts with the last `begun` (B,) image tokens of the record before. idle (B,): rows that write nothing.
    """
    B, T, D = rows.u.shape
    at = jnp.arange(room)
    head = at < begun[:, None]
    u = jnp.zeros((B, room, D))
    if T:
        before = jnp.clip((rows.begun + rows.count - begun)[:, None] + at, 0, T - 1)
        u = jnp.where(head[..., None], jnp.take_along_axis(rows.u, before[..., None], axis=1), 0)
    W = rows.logprobs.shape[-1]
    fresh = dict(
        controls=controls,
        tokens=jnp.where(head, -1, -2),
        u=u,
        likely=jnp.zeros((B, room, W), jnp.int32),
        logprobs=jnp.zeros((B, room, W)),
        begun=begun,
        count=jnp.zeros_like(begun),
        done=idle,
    )
    return constrain_rows(fresh)


@jax.jit
def take_back(rows: Rows, count: np.ndarray) -> Rows:
    """Rows without their last `count` (B,) positions in all branches. These positions belong to an unfinished image."""
    back = jnp.repeat(count, len(rows.offset) // len(count))
    return rows.replace(
        caches=rows.caches.rewind(rows.caches.length - back),
        offset=rows.offset - (back > 0),  # <|vision_start|> advanced it by one, the image's tokens did not
        token=jnp.where(count > 0, -1, rows.token),
        in_image=jnp.where(count > 0, -1, rows.in_image),
    )


@jax.jit
def take(rows: Rows, indices: np.ndarray, seeds: np.ndarray) -> Rows:
    """Copies of the rows `indices`, each with a seed of its own: continuations of the same context."""
    B = len(rows.done)
    inner = (indices[:, None] * (len(rows.offset) // B) + np.arange(len(rows.offset) // B)).reshape(-1)

    def pick(x):
        return jnp.take(x, indices if len(x) == B else inner, axis=0)

    taken = jax.tree.map(pick, rows.replace(key=None)).replace(key=jax.vmap(jax.random.key)(seeds))
    return constrain_rows(taken)


def put(rows: Rows, index: jax.Array, one: Rows) -> Rows:
    """Rows with row `index` replaced by `one`, a single row whose caches and record have the same room."""
    B = len(rows.done)

    def write(x, y):
        return jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), index * (len(x) // B), axis=0)

    rest = jax.tree.map(write, rows.replace(key=None), one.replace(key=None))
    return rest.replace(key=rows.key.at[index].set(one.key[0]))


@partial(jax.jit, static_argnums=1)
def with_room(rows: Rows, capacity: int) -> Rows:
    """The same rows with caches of at least `capacity` positions; their contents stay."""

    def grow(x):
        more = max(capacity - x.shape[2], 0) if x.ndim > 1 else 0
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x

    return rows.replace(caches=constrain_rows(jax.tree.map(grow, rows.caches)))


def bucket(length: int) -> int:
    """The least of BUCKET, 2 BUCKET, 4 BUCKET, ... that is at least `length`."""
    return BUCKET * power(-(-length // BUCKET))


def rounded(count: int) -> int:
    """`count` rounded up by at most a quarter, so that a doubling of rows compiles at most four programs."""
    step = max(power(count) // 8, 1)
    return -(-count // step) * step


def power(count: int) -> int:
    """The least power of two that is at least `count` and at least 1."""
    return 1 << max(int(count) - 1, 0).bit_length()
