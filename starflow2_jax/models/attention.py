"""Attention by plain matrix products, with its masks, the key/value cache and rotary angles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

MASKED = -1e30  # finite, so that a query that sees no key does not become NaN


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer of a causal stack, and how much of each row is filled.

    `length` is the number of positions that a row has read. A call with S new positions writes positions length ..
    length + S - 1. Positions from `length` on are never seen, so lowering `length` rewinds a row, or drops the padding
    at its end. Each layer has an array of its own, written in place, with the positions of a head contiguous, as
    decoding reads them.
    """

    keys: tuple[jax.Array, ...]  # L of (B, J, C, K)
    values: tuple[jax.Array, ...]  # L of (B, J, C, K)
    length: jax.Array  # (B,) int32

    @classmethod
    def empty(
        cls, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
    ) -> "KVCache":
        """A cache whose rows have read nothing."""
        keys, values = (
            tuple(jnp.zeros((batch, kv_heads, capacity, head_dim), dtype) for _ in range(layers)) for _ in range(2)
        )
        return cls(keys, values, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Positions that a row has room for, C."""
        return self.keys[0].shape[2]


def write_cache(stored: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`stored` (B, J, C, K) with `new` (B, S, J, K) written from position start[b] on.

    On CPU each head is written by itself: XLA fuses the write of a whole row into the attention that reads the cache,
    and copies the cache for it.
    """
    new = new.swapaxes(1, 2).astype(stored.dtype)
    by_row = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    by_head = jax.vmap(jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0)))
    return jax.lax.platform_dependent(
        stored,
        new,
        start,
        cpu=lambda stored, new, start: by_head(stored, new, jnp.broadcast_to(start[:, None], new.shape[:2])),
        default=by_row,
    )


def cached_mask(length: jax.Array, steps: int, capacity: int) -> jax.Array:
    """(B, steps, capacity) bool: new position i of row b sees the positions up to its own, length[b] + i, included."""
    last = length[:, None] + jnp.arange(steps)
    return jnp.arange(capacity) <= last[:, :, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Softmax attention with logits and softmax in fp32.

    q (B, S, H, K); k, v (B, C, J, K), J divides H; mask (B, S, C) or broadcastable, True where visible. Logits are
    scaled by K^-0.5 and divided by `temperature`. Returns (B, S, H, K) in q's dtype.
    """
    B, S, H, K = q.shape
    J = k.shape[2]
    q = (q * (K**-0.5 / temperature)).reshape(B, S, J, H // J, K)
    logits = jnp.einsum("bsjrk,bcjk->bjrsc", q, k, preferred_element_type=jnp.float32)
    weights = _softmax(logits, mask).astype(v.dtype)
    return jnp.einsum("bjrsc,bcjk->bsjrk", weights, v).reshape(B, S, H, K)


def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, temperature: float = 1.0) -> jax.Array:
    """`attend` with keys and values in the layout of a KVCache, (B, J, C, K), which it reads without a copy."""
    B, S, H, K = q.shape
    J = k.shape[1]
    R = H // J
    q = (q * (K**-0.5 / temperature)).reshape(B, S, J, R, K).transpose(0, 2, 3, 1, 4).reshape(B, J, R * S, K)
    heads = ((0, 1), (0, 1))
    logits = jax.lax.dot_general(k, q, (((3,), (3,)), heads), preferred_element_type=jnp.float32)  # (B, J, C, R S)
    weights = _softmax(logits.swapaxes(-1, -2).reshape(B, J, R, S, -1), mask)
    weights = weights.reshape(B, J, R * S, -1).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((3,), (2,)), heads))
    return out.reshape(B, J, R, S, K).transpose(0, 3, 1, 2, 4).reshape(B, S, H, K)


def _softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax of logits (B, J, R, S, C) over C, where mask (B, S, C) or broadcastable is True."""
    return jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1)


def multimodal_angles(positions: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...]) -> jax.Array:
    """Multimodal rotary angles (B, S, K/2) fp32 of positions (B, S, 3): time, row, column (arXiv 2409.12191).

    `sections` are the numbers of frequencies that follow each of the three. Raises ValueError if their sum is not K/2.
    """
    if sum(sections) != head_dim // 2:
        raise ValueError(f"rotary sections {sections} must sum to head_dim / 2 = {head_dim // 2}")
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    axis = np.repeat(np.arange(len(sections)), sections)
    return jnp.asarray(positions, jnp.float32)[..., axis] * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the pairs of channels (i, i + K/2) of x (B, S, H, K) by angles (B, S, K/2) or (S, K/2), in fp32 at least.

    STARFlow pairs channels (2i, 2i + 1) instead; `weights/flow.py` reorders them, which does not change q k.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
