"""A hash of a tree's content. No array needs to be in one place: it works on devices, on shards, or piece by piece."""

import hashlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.parallel import sharding

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def content_hash(tree: dict) -> str:
    """Hash of all arrays' names, types, shapes and bits, whatever their layout on devices.

    Every number's bits are mixed with its position and summed modulo 2^32, twice. The mixing maps integers one to one, so
    one changed number always changes the hash; two or more changes escape with a chance of about 2^-64. Sums do not depend
    on the order, so each device sums its own part, and no array is gathered or copied. The hash is the SHA-256 of names,
    types, shapes and sums. It detects damage and mix-ups; it does not protect against forged weights.
    """
    leaves = ((sharding.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))
    return combine((path, x.dtype, x.shape, np.asarray(sums(x, (0,) * x.ndim))) for path, x in leaves)


@jax.jit
def sums(piece: jax.Array, start: Sequence[int]) -> jax.Array:
    """(2,) uint32: an array's sums, or the share of its piece at position `start` in them (modulo 2^32)."""
    if piece.dtype.itemsize not in UNSIGNED:
        raise ValueError(f"an array of {piece.dtype} has no content hash")
    key = jnp.zeros(
        (1,) * piece.ndim, jnp.uint32
    )  # grows one axis at a time, so that most of the mixing works on small arrays
    for axis, first in enumerate(start):
        index = jnp.arange(piece.shape[axis], dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
        key = _mix(key + jnp.expand_dims(index, [i for i in range(piece.ndim) if i != axis]))
    bits = piece.astype(jnp.uint8) if piece.dtype == bool else piece
    bits = jax.lax.bitcast_convert_type(bits, UNSIGNED[piece.dtype.itemsize]).astype(jnp.uint32)
    first = _mix(bits ^ key)
    second = _mix(first + np.uint32(0x85EBCA77))
    zero = np.uint32(0)
    both = jax.lax.reduce(
        (first, second), (zero, zero), _add, range(piece.ndim)
    )  # in one pass, without storing the mixed bits
    return jnp.stack(both)


def _add(a: tuple, b: tuple) -> tuple:
    return a[0] + b[0], a[1] + b[1]


def _mix(x: jax.Array) -> jax.Array:
    """A one-to-one map of uint32 that spreads every bit, by xor-shifts and odd factors."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def combine(leaves: Iterable[tuple[str, np.dtype, tuple[int, ...], np.ndarray]]) -> str:
    """(path, type, shape, sums) of every array -> the hash of the tree."""
    lines = sorted(f"{path} {np.dtype(kind)} {tuple(shape)} {total.tolist()}" for path, kind, shape, total in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
