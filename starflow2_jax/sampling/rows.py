"""The state of a batch that is being read and written: caches, what the last position said, and each row's own options."""

import math
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Caches, Pretzel
from starflow2_jax.parallel.sharding import constrain_rows

BUCKET = 32  # prompts and caches are as long as this times a power of two, so that few shapes are compiled
WHOLE = ("max_tokens", "top_k", "max_images", "jacobi")  # options that are whole numbers
LEAST = {
    "max_tokens": 1, "temperature": 0, "image_temperature": 0, "guidance": 0, "image_guidance": 0, "top_k": 0, "top_p": 0,
    "max_images": 0, "jacobi": 0, "tolerance": 0,
}  # fmt: skip


@dataclass(frozen=True)
class SampleOptions:
    """How to write. All but `stop`, `jacobi`, `tolerance` and which guidance there is may differ from row to row for free.

    Raises UserError for a value that means nothing.
    """

    temperature: float = 1.0  # of text; 0: the most likely token
    image_temperature: float = 1.0  # tau in u = mu + tau sigma z
    guidance: float = 0.0  # w >= 0 of the images; 0: none
    max_tokens: int | None = None  # positions to write, image tokens included; None: two images' worth, 128 at least
    image_first: bool = False  # begin with an image
    top_k: int = 0  # draw text from the k most likely tokens; 0: from all
    top_p: float = 1.0  # draw text from the fewest tokens of at least this probability; 0: the most likely one
    image_guidance: float | None = None  # given: `guidance` leaves out the text only, this one the images before, too
    linear: bool = False  # guidance by extrapolation (TarFlow) instead of Gaussian mixing (STARFlow)
    annealed: bool = False  # guidance grows over the image, w (i + 1) / (N - 1)
    max_images: int | None = None  # of a turn, one that it finishes included; 0: text only; None: as many as it likes
    stop: tuple[str, ...] = ()  # strings that end the answer, and are left out of it
    jacobi: int = 0  # image tokens that are solved for at once; 1: one after another; 0: as calibrated, else as 1
    tolerance: float = 1e-3  # of a Jacobi pass: mean squared change over mean square; jacobi 0: as calibrated

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "image_guidance", "max_images"):
                continue
            kind = Integral if name in WHOLE else Real
            if not isinstance(value, kind) or not math.isfinite(value) or value < least:
                raise UserError(
                    f"{name} is a {'whole ' if kind is Integral else ''}number of at least {least}, not {value!r}"
                )
        if self.top_p > 1:
            raise UserError(f"top_p is a probability, at most 1, not {self.top_p!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop is a tuple of texts, none of them empty, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))

    def sized(self, image: int) -> "SampleOptions":
        """The same, its `max_tokens` a number, for a model whose images have `image` tokens."""
        return self if self.max_tokens else replace(self, max_tokens=max(128, 2 * (image + 2)))

    @property
    def calibrated(self) -> bool:
        """Whether images are decoded as the checkpoint was calibrated for; `jacobi` 1 asks for token by token."""
        return self.jacobi != 1

    @property
    def branches(self) -> tuple[str, ...]:
        """What guidance compares with: the same without its text ("images"), and nothing before the image ("bare")."""
        if self.image_guidance is not None:
            return ("images", "bare")
        return ("bare",) if self.guidance else ()


class Controls(struct.PyTreeNode):
    """SampleOptions of each row, sized; (B,) or as noted."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    image_temperature: jax.Array
    weights: jax.Array  # (B, branches)
    linear: jax.Array
    annealed: jax.Array
    max_tokens: jax.Array
    images_left: jax.Array  # negative: any number
    image_next: jax.Array  # bool: what is drawn next is <|vision_start|>

    @classmethod
    def of(
        cls, options: list[SampleOptions], branches: tuple[str, ...], inside: np.ndarray | bool = False
    ) -> "Controls":
        """`inside` (B,): rows that are within an image; it counts as the first of the turn."""

        def every(name, dtype=np.float32):
            return np.array([getattr(o, name) for o in options], dtype)

        weight = {"images": [o.guidance for o in options], "bare": [_bare_weight(o) for o in options]}
        return cls(
            every("temperature"),
            every("top_k", np.int32),
            every("top_p"),
            every("image_temperature"),
            np.array([weight[b] for b in branches], np.float32).reshape(len(branches), len(options)).T,
            every("linear", bool),
            every("annealed", bool),
            every("max_tokens", np.int32),
            np.array([-1 if o.max_images is None else o.max_images for o in options], np.int32) - inside,
            every("image_first", bool) & ~np.asarray(inside),
        )


def _bare_weight(options: SampleOptions) -> float:
    return options.guidance if options.image_guidance is None else options.image_guidance


class Rows(struct.PyTreeNode):
    """B rows of G = 1 + branches cache rows each, side by side: row b's own is cache row b G, its branches follow."""

    caches: Caches  # of (B G) rows
    text: jax.Array  # (B, E): hidden state of the last position read, for the text head
    mean: jax.Array  # (B G, D): what it says of an image token that may follow
    scale: jax.Array  # (B G, D)
    offset: jax.Array  # (B G,) rotary offset of the next text position, or of the image being written
    token: jax.Array  # (B,) the last token read
    in_image: jax.Array  # (B,) which image token was read last; -1: none
    drawn: jax.Array  # (B,) draws so far: with the row's key, where its randomness stands
    computed: jax.Array  # (B G,) positions that either stream ever ran, Jacobi's repeated passes left out
    passes: jax.Array  # (B,) runs of the model that this row took part in
    done: jax.Array  # (B,) bool
    key: jax.Array  # (B,)
    controls: Controls
    tokens: jax.Array  # (B, T) the turn's record; -1 an image token, -2 nothing
    u: jax.Array  # (B, T, D)
    begun: jax.Array  # (B,) image tokens that it begins with: those of an image that the turn before left open
    count: jax.Array  # (B,) positions written in this turn; they stand behind


@partial(jax.jit, static_argnums=(0, 2))
def empty_rows(model: Pretzel, seeds: np.ndarray, branches: tuple[str, ...]) -> Rows:
    """Rows that have read nothing, one a seed, with no room yet. They, as what the functions below make, lie on the mesh in
    force."""
    B, G, cfg = len(seeds), 1 + len(branches), model.cfg

    def number(value: int) -> jax.Array:
        return jnp.full((B,), value, jnp.int32)

    rows = Rows(
        caches=model.apply({}, B * G, 0, method=Pretzel.empty_caches),
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
        begun=number(0),
        count=number(0),
    )
    return constrain_rows(rows)


@partial(jax.jit, static_argnums=2)
def new_turn(rows: Rows, controls: Controls, room: int, begun: np.ndarray, idle: np.ndarray) -> dict:
    """What a turn begins with: its options, and a record with room for `room` positions, in which nothing is written yet
    but the last `begun` (B,) image tokens of the one before. idle (B,): rows that write none."""
    B, T, D = rows.u.shape
    at = jnp.arange(room)
    head = at < begun[:, None]
    u = jnp.zeros((B, room, D))
    if T:
        before = jnp.clip((rows.begun + rows.count - begun)[:, None] + at, 0, T - 1)
        u = jnp.where(head[..., None], jnp.take_along_axis(rows.u, before[..., None], axis=1), 0)
    fresh = dict(
        controls=controls, tokens=jnp.where(head, -1, -2), u=u, begun=begun, count=jnp.zeros_like(begun), done=idle
    )
    return constrain_rows(fresh)


@jax.jit
def take_back(rows: Rows, count: np.ndarray) -> Rows:
    """Forget the last `count` (B,) positions, in all lanes: an image that is not whole, its <|vision_start|> included."""
    back = jnp.repeat(count, len(rows.offset) // len(count))
    return rows.replace(
        caches=rows.caches.rewind(rows.caches.length - back),
        offset=rows.offset - (back > 0),  # within an image it stands still
        token=jnp.where(count > 0, -1, rows.token),
        in_image=jnp.where(count > 0, -1, rows.in_image),
    )


@jax.jit
def take(rows: Rows, indices: np.ndarray, seeds: np.ndarray) -> Rows:
    """Copies of the given rows, each with a seed of its own: continuations that share what was read."""
    B = len(rows.done)
    inner = (indices[:, None] * (len(rows.offset) // B) + np.arange(len(rows.offset) // B)).reshape(-1)

    def pick(x):
        return jnp.take(x, indices if len(x) == B else inner, axis=0)

    taken = jax.tree.map(pick, rows.replace(key=None)).replace(key=jax.vmap(jax.random.key)(seeds))
    return constrain_rows(taken)


def put(rows: Rows, index: jax.Array, one: Rows) -> Rows:
    """`one` (of a single row) in place of row `index`; both with the same room."""
    B = len(rows.done)

    def write(x, y):
        return jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), index * (len(x) // B), axis=0)

    rest = jax.tree.map(write, rows.replace(key=None), one.replace(key=None))
    return rest.replace(key=rows.key.at[index].set(one.key[0]))


@partial(jax.jit, static_argnums=1)
def with_room(rows: Rows, capacity: int) -> Rows:
    """The same with caches of at least `capacity` positions; what was read is not run again."""

    def grow(x):
        more = max(capacity - x.shape[2], 0) if x.ndim > 1 else 0
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x

    return rows.replace(caches=constrain_rows(jax.tree.map(grow, rows.caches)))


def bucket(length: int) -> int:
    """BUCKET times the least power of two that holds `length`."""
    return BUCKET * power(-(-length // BUCKET))


def rounded(count: int) -> int:
    """`count` rows, or up to a quarter more, so that few numbers of rows are compiled: at most four to a doubling."""
    step = max(power(count) // 8, 1)
    return -(-count // step) * step


def power(count: int) -> int:
    """The least power of two that is not below `count`, at least 1."""
    return 1 << max(int(count) - 1, 0).bit_length()
