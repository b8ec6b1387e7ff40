"""Autoregressive affine flows over the tokens of one image (TarFlow, arXiv 2412.06329; STARFlow, arXiv 2506.06276).

Training maps data to noise (`forward`), sampling inverts (`inverse`), both through the same causal conditioner.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.errors import UserError, require_one_of
from starflow2_jax.models import attention
from starflow2_jax.models.jacobi import SEQUENTIAL, Jacobi, Schedule, solve
from starflow2_jax.models.layers import Norm, Transformer, TransformerConfig, dense, widened

SOFTPLUS_ONE = 0.541324854612918  # softplus of this is 1
TEXT_PAIRS = 8  # rotary pairs that a model which takes text gives to the text axis
STARTS, SCALES, POSITIONS = ("token", "shift"), ("softplus", "exp"), ("rotary", "learned")

# (mean, scale) conditional, (mean, scale) unconditional, each (B, c, D), index in the image (c, 1) -> (mean, scale)
Guide = Callable[[tuple, tuple, jax.Array], tuple]


def gaussian(raw: jax.Array, scale: str, soft_clip: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Network output (..., 2D) -> mean and scale (..., D), fp32 at least.

    scale: "softplus" (STARFlow) or "exp" (TarFlow). soft_clip c: the output o becomes c tanh(o / c) first; 0: it does
    not.
    """
    raw = widened(raw)
    if soft_clip:
        raw = soft_clip * jnp.tanh(raw / soft_clip)
    a, b = jnp.split(raw, 2, axis=-1)
    return b, jnp.exp(a) if scale == "exp" else jax.nn.softplus(a + SOFTPLUS_ONE)


def normalize(h: jax.Array, mean: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """z = (h - mean) / scale and the elementwise log-determinant of this map, fp32 at least."""
    return (widened(h) - mean) / scale, -jnp.log(scale)


def grid_angles(grid: tuple[int, int], side: float, head_dim: int, theta: float, text: int | None) -> jax.Array:
    """STARFlow's rotary angles: one row (K/2,) for each text token, then one for each image token in raster order.

    grid: (h, w). side: the side of the training grid. text: how many text tokens; None: the model takes no text, and
    all rotary pairs belong to row and column.
    """
    h, w = grid
    image_pairs = head_dim // 2 - (0 if text is None else TEXT_PAIRS)
    f = theta ** (-2 * jnp.arange(image_pairs // 2) / image_pairs)
    rows = jnp.repeat(jnp.arange(h), w) / (h * w) ** 0.5 * side
    columns = jnp.tile(jnp.arange(w), h) / (h * w) ** 0.5 * side
    image = jnp.concatenate([rows[:, None] * f, columns[:, None] * f], axis=-1)
    if text is None:
        return image
    g = theta ** (-jnp.arange(TEXT_PAIRS) / TEXT_PAIRS)
    image = jnp.pad(image, ((0, 0), (0, TEXT_PAIRS)))
    prefix = (jnp.arange(text) / max(text, 1) * side)[:, None] * g
    return jnp.concatenate([jnp.pad(prefix, ((0, 0), (2 * f.size, 0))), image])


@dataclass(frozen=True)
class FlowBlockConfig:
    """One block of a flow. Raises UserError for values that do not fit each other."""

    grid: tuple[int, int]  # (h, w): N = h w tokens in raster order
    channels: int  # D
    transformer: TransformerConfig
    flip: bool = False  # read the tokens in reverse order
    start: str = "token"  # "token": a learned start token predicts the first; "shift": the first has mean 0 and scale 1
    scale: str = "softplus"  # or "exp", see `gaussian`
    soft_clip: float = 0.0  # see `gaussian`
    positions: str = "rotary"  # or "learned"
    rotary_theta: float = 1e4
    rotary_text: bool = False  # the model takes text: rotary positions have a text axis, in every block
    rotary_side: float = 0.0  # side of the training grid; 0: of this grid
    final_norm: bool = False
    classes: int = 0  # classes with an embedding that is added to every token; a negative label means their mean
    prefix_channels: int = 0  # channels of text features that are put in front of the image's tokens; 0: none

    def __post_init__(self):
        for name, allowed in (("start", STARTS), ("scale", SCALES), ("positions", POSITIONS)):
            require_one_of(name, getattr(self, name), allowed)
        if self.positions != "rotary":
            return
        if self.prefix_channels and not self.rotary_text:
            raise UserError("a flow block with rotary positions and a prefix needs rotary_text")
        of_text, head = 2 * TEXT_PAIRS * self.rotary_text, self.transformer.head
        if head <= of_text or (head - of_text) % 4:
            raise UserError(
                f"heads have {head} channels (width / heads), of which rotary positions take {of_text} for text and a "
                "multiple of 4 for row and column"
            )


class Context(struct.PyTreeNode):
    """The condition of a block: `label` (B,) int, or `prefix` (B, T, prefix_channels), or nothing."""

    label: jax.Array | None = None
    prefix: jax.Array | None = None


NO_CONTEXT = Context()


class FlowBlock(nn.Module):
    """An affine map of each token, h = mean + scale z, whose mean and scale a causal Transformer predicts."""

    cfg: FlowBlockConfig

    def setup(self):
        c, t = self.cfg, self.cfg.transformer
        self.proj_in = dense(t.width, "proj_in", True, t.dtype)
        self.stack = Transformer(t)
        wide = jnp.promote_types(t.dtype, jnp.float32).name
        self.proj_out = dense(2 * c.channels, "proj_out", True, wide, gain=0.0)
        tokens = c.grid[0] * c.grid[1]
        if c.final_norm:
            self.norm = Norm("rms_zero")
        if c.start == "token":
            self.start_token = self.param("start_token", nn.initializers.normal(1.0), (c.channels,))
        if c.positions == "learned":
            self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.01), (tokens, t.width))
        if c.classes:
            self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.01), (c.classes, t.width))
        if c.prefix_channels:
            self.proj_prefix = dense(t.width, "proj_prefix", True, t.dtype)

    @property
    def predicted(self) -> int:
        """Positions that the Transformer runs over: N, or N - 1 if the first token needs no prediction."""
        return self.cfg.grid[0] * self.cfg.grid[1] - (self.cfg.start == "shift")

    def __call__(self, h: jax.Array, context: Context = NO_CONTEXT) -> tuple[jax.Array, jax.Array]:
        """As `forward`."""
        return self.forward(h, context)

    def forward(self, h: jax.Array, context: Context = NO_CONTEXT) -> tuple[jax.Array, jax.Array]:
        """h (B, N, D) -> z and the elementwise log-determinant, both (B, N, D) fp32, in raster order."""
        h = self._order(widened(h))
        B, _, D = h.shape
        seen = h[:, :-1]
        if self.cfg.start == "token":
            seen = jnp.concatenate([jnp.broadcast_to(self.start_token, (B, 1, D)), seen], axis=1)
        x, angles = self._embed(seen, jnp.arange(self.predicted), context)
        prefix = 0 if context.prefix is None else context.prefix.shape[1]
        if prefix:
            x = jnp.concatenate([self.proj_prefix(context.prefix), x], axis=1)
            angles = self._angles(prefix)
            angles = None if angles is None else angles[: prefix + self.predicted]
        x, _ = self.stack(x, angles)
        mean, scale = self._head(x[:, prefix:])
        if self.cfg.start == "shift":
            mean, scale = (jnp.pad(a, ((0, 0), (1, 0), (0, 0)), constant_values=v) for a, v in ((mean, 0), (scale, 1)))
        z, logdet = normalize(h, mean, scale)
        return self._order(z), self._order(logdet)

    def inverse(
        self,
        z: jax.Array,
        context: Context = NO_CONTEXT,
        unconditional: Context | None = None,
        guide: Guide | None = None,
        temperature: float = 1.0,
        solver: Jacobi = SEQUENTIAL,
    ) -> jax.Array:
        """z (B, N, D) -> h (B, N, D), chunk by chunk through a key/value cache, solved by `solver`.

        With `guide`, predictions under `unconditional`, whose attention logits are divided by `temperature`, are mixed
        with those under `context`. The number of passes over each chunk, (B, chunks), is sown as "passes" into the
        collection "inversion".
        """
        z = self._order(widened(z))
        B, N, D = z.shape
        conditions = [(context, 1.0)] + ([(unconditional or NO_CONTEXT, temperature)] if guide else [])
        first = N - self.predicted
        begin = jnp.broadcast_to(self.start_token, (B, D)) if self.cfg.start == "token" else z[:, 0]
        block, variables = self.unbind()  # Flax modules do not mix with jax.lax loops

        def predict(seen: jax.Array, start: jax.Array, caches: Any) -> Any:
            return block.apply(variables, seen, start, caches, conditions, guide, method=FlowBlock._predict)

        h, passes = solve(predict, z[:, first:], begin, [self._prefill(c, B) for c, _ in conditions], solver)
        newest: Any = lambda _, new: new  # noqa: E731 - Flax's annotation wants two arguments of one type
        self.sow("inversion", "passes", passes, init_fn=lambda: None, reduce_fn=newest)
        return self._order(jnp.concatenate([z[:, :first], h], axis=1))

    def _predict(
        self,
        seen: jax.Array,
        start: jax.Array,
        caches: list[attention.KVCache],
        conditions: list[tuple[Context, float]],
        guide: Guide | None,
    ) -> tuple[jax.Array, jax.Array, list[attention.KVCache]]:
        """Means and scales (B, c, D) of tokens start .. start + c - 1 from the tokens before them, `seen` (B, c, D).

        `caches` hold the tokens before `start`, one cache for each of `conditions`; returns them grown by c.
        """
        at = start + jnp.arange(seen.shape[1])
        outputs, grown = [], []
        for (context, temperature), cache in zip(conditions, caches, strict=True):
            x, angles = self._embed(seen, at, context)
            prefix = 0 if context.prefix is None else context.prefix.shape[1]
            cache = cache.replace(length=jnp.full_like(cache.length, prefix + start))
            x, cache = self.stack(x, angles, cache=cache, temperature=temperature)
            outputs.append(self._head(x))
            grown.append(cache)
        mean, scale = guide(outputs[0], outputs[1], at[:, None]) if guide else outputs[0]
        return mean, scale, grown

    def _order(self, x: jax.Array) -> jax.Array:
        """Raster order <-> the order in which this block reads the tokens, along axis 1."""
        return x[:, ::-1] if self.cfg.flip else x

    def _angles(self, prefix: int = 0) -> jax.Array | None:
        """Rotary angles of `prefix` text tokens and the N tokens; None with learned positions."""
        c = self.cfg
        if c.positions != "rotary":
            return None
        side, text = c.rotary_side or c.grid[0], prefix if c.rotary_text else None
        return grid_angles(c.grid, side, c.transformer.head, c.rotary_theta, text)

    def _embed(self, seen: jax.Array, at: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        """Tokens (B, S, D), read where those at `at` (S,) are predicted -> embeddings (B, S, E), angles (S, K/2)."""
        c = self.cfg
        x = self.proj_in(seen)
        if c.positions == "learned":
            x = x + self._order(self.position_embedding[None])[0][at]
        if c.classes:
            null, label = jnp.mean(self.class_embedding, axis=0), context.label
            embedded = null if label is None else jnp.where(label[:, None] < 0, null, self.class_embedding[label])
            x = x + embedded.reshape(-1, 1, x.shape[-1])
        angles = self._angles()
        return x, None if angles is None else angles[at]

    def _head(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Transformer output (B, S, E) -> mean and scale (B, S, D)."""
        return gaussian(self.proj_out(self.norm(x) if self.cfg.final_norm else x), self.cfg.scale, self.cfg.soft_clip)

    def _prefill(self, context: Context, batch: int) -> attention.KVCache:
        """A cache with room for the image, which holds the context's prefix."""
        prefix = 0 if context.prefix is None else context.prefix.shape[1]
        cache = self.stack.empty_cache(batch, prefix + self.predicted)
        if prefix:
            x, angles = self.proj_prefix(context.prefix), self._angles(prefix)
            _, filled = self.stack(x, None if angles is None else angles[:prefix], cache=cache)
            assert filled is not None, "a call with a cache returns one"
            return filled
        return cache


class Flow(nn.Module):
    """A chain of blocks, the first nearest the data. Blocks without a condition ignore the context."""

    blocks: tuple[FlowBlockConfig, ...]

    def setup(self):
        self.chain = [FlowBlock(cfg, name=f"block_{i}") for i, cfg in enumerate(self.blocks)]

    def __call__(self, h: jax.Array, context: Context = NO_CONTEXT) -> tuple[jax.Array, jax.Array]:
        """As `forward`."""
        return self.forward(h, context)

    def forward(self, h: jax.Array, context: Context = NO_CONTEXT) -> tuple[jax.Array, jax.Array]:
        """h (B, N, D) -> z (B, N, D) and the chain's log-determinant, elementwise (B, N, D)."""
        states, logdets = self.trace(h, context)
        return states[-1], jnp.asarray(sum(logdets))

    def trace(self, h: jax.Array, context: Context = NO_CONTEXT) -> tuple[list[jax.Array], list[jax.Array]]:
        """The output of each block, and each block's elementwise log-determinant, (B, N, D) each."""
        states, logdets = [], []
        for block in self.chain:
            h, logdet = block.forward(h, self._context(block, context))
            states.append(h)
            logdets.append(logdet)
        return states, logdets

    def inverse(
        self,
        z: jax.Array,
        context: Context = NO_CONTEXT,
        unconditional: Context | None = None,
        guide: Guide | None = None,
        temperature: float = 1.0,
        schedule: Schedule | None = None,
    ) -> jax.Array:
        """z (B, N, D) -> h (B, N, D); arguments as in FlowBlock.inverse. Blocks without a condition are not guided.

        schedule: a solver for each block; None: all are solved token by token. Raises ValueError for another number of
        solvers than blocks.
        """
        solvers = (SEQUENTIAL,) * len(self.chain) if schedule is None else schedule
        for block, solver in reversed(list(zip(self.chain, solvers, strict=True))):
            here = self._context(block, context)
            if guide and (block.cfg.classes or block.cfg.prefix_channels):
                other = self._context(block, unconditional or NO_CONTEXT)
                z = block.inverse(z, here, other, guide, temperature, solver)
            else:
                z = block.inverse(z, here, solver=solver)
        return z

    @staticmethod
    def _context(block: FlowBlock, context: Context) -> Context:
        """The part of the context that a block takes."""
        return Context(
            context.label if block.cfg.classes else None, context.prefix if block.cfg.prefix_channels else None
        )


def alternating(first: FlowBlockConfig, count: int, flip_odd: bool = True) -> tuple[FlowBlockConfig, ...]:
    """`count` copies of a block, of which the odd ones (TarFlow) or the even ones (STARFlow) are flipped."""
    return tuple(replace(first, flip=bool(i % 2) == flip_odd) for i in range(count))
