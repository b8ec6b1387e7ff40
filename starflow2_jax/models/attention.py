"""Attention: masks, the kernel, the key/value cache and rotary angles."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

MASKED = -1e30  # finite, so that a row that sees nothing stays a number


@struct.dataclass
class KVCache:
    """Keys and values of every layer of one causal stack, and how much of each row is filled.

    `length` is the number of positions row b has read. A call with S new positions writes slots length .. length+S-1;
    what lies beyond `length` is never seen, so a row is rewound (or right padding dropped) by lowering its `length`.
    An array a layer, each written in place, a head's slots side by side: what a step of decoding reads.
    """

    keys: tuple[jax.Array, ...]  # L of (B, J, C, K)
    values: tuple[jax.Array, ...]  # L of (B, J, C, K)
    length: jax.Array  # (B,) int32

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype=jnp.float32) -> "KVCache":
        keys, values = (
            tuple(jnp.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(layers)) for _ in range(2)
        )
        return cls(keys, values, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """C."""
        return self.keys[0].shape[2]


def write_slots(stored: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Write `new` (B, S, J, K) into `stored` (B, J, C, K) from slot start[b] on."""

    def row(a, b, s):
        return jax.lax.dynamic_update_slice_in_dim(a, b.swapaxes(0, 1).astype(a.dtype), s, axis=1)

    return jax.vmap(row)(stored, new, start)


def causal_mask(segments: jax.Array) -> jax.Array:
    """(B, S, S) bool: query s sees key c <= s of its own document (`segments` (B, S), equal ids see each other)."""
    size = segments.shape[1]
    return (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((size, size), bool))


def cached_mask(length: jax.Array, steps: int, slots: int) -> jax.Array:
    """(B, steps, slots) bool: new position i of row b sees the slots up to and with its own, length[b] + i."""
    last = length[:, None] + jnp.arange(steps)
    return jnp.arange(slots) <= last[:, :, None]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, temperature: float = 1.0, layout: str = "bcjk"
) -> jax.Array:
    """Softmax attention, logits and softmax in fp32.

    q (B, S, H, K); k, v (B, C, J, K) with J dividing H, or as `layout` says; mask (B, S, C) or broadcastable, True where
    visible. Logits are scaled by K^-0.5 and divided by `temperature`. Returns (B, S, H, K) in q's dtype.
    """
    B, S, H, K = q.shape
    J = k.shape[layout.index("j")]
    q = (q * (K**-0.5 / temperature)).reshape(B, S, J, H // J, K)
    logits = jnp.einsum(f"bsjrk,{layout}->bjrsc", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum(f"bjrsc,{layout}->bsjrk", weights, v).reshape(B, S, H, K)


def multimodal_angles(positions: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...]) -> jax.Array:
    """Qwen2.5-VL's rotary angles (B, S, K/2) fp32: `sections` of the frequencies follow each axis of
    positions (B, S, 3): time, row, column."""
    if sum(sections) != head_dim // 2:
        raise ValueError(f"rotary sections {sections} must sum to head_dim / 2 = {head_dim // 2}")
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    axis = np.repeat(np.arange(len(sections)), sections)
    return jnp.asarray(positions, jnp.float32)[..., axis] * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the pairs of channels (i, i + K/2) of x (B, S, H, K) by angles (B, S, K/2), or (S, K/2), in fp32 at least.

    STARFlow pairs (2i, 2i+1) instead; `weights/flow.py` sorts its channels, which leaves their products what they are.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
