"""A hash of the content of a tree of arrays. It is computed where the arrays are: on devices, by shards, or piece by
piece.
"""

import hashlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.parallel import sharding

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def content_hash(tree: dict) -> str:
    """Hash of the names, types, shapes and bits of all arrays, whatever their layout on devices.

    For each array, the bits of every number are mixed with its position, and the results are summed modulo 2^32; this
    is done twice, with different mixing. The hash is the SHA-256 of all names, types, shapes and sums. Mixing is
    one-to-one, so a single changed number always changes the hash; with more changes it stays the same with a chance of
    about 2^-64. A sum does not depend on the order, so each device sums its own shards, and no array is gathered or
    copied.

    The hash detects damage and mix-ups. It does not protect against forged weights. Raises ValueError for arrays whose
    numbers have 8 bytes or more.
    """
    leaves = ((sharding.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))
    return combine((path, x.dtype, x.shape, np.asarray(sums(x, (0,) * x.ndim))) for path, x in leaves)


@jax.jit
def sums(piece: jax.Array, start: Sequence[int]) -> jax.Array:
    """The two sums of an array, (2,) uint32. Those of its pieces add up to them, modulo 2^32.

    `start`: the position of the piece in the array, one index for each axis; zeros for a whole array.
    """
    if piece.dtype.itemsize not in UNSIGNED:
        raise ValueError(f"an array of {piece.dtype} has no content hash")
    # A number for each position. It grows one axis at a time, so that most of the mixing works on small arrays.
    key = jnp.zeros((1,) * piece.ndim, jnp.uint32)
    for axis, first in enumerate(start):
        index = jnp.arange(piece.shape[axis], dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
        key = _mix(key + jnp.expand_dims(index, [i for i in range(piece.ndim) if i != axis]))
    bits = piece.astype(jnp.uint8) if piece.dtype == bool else piece
    bits = jax.lax.bitcast_convert_type(bits, UNSIGNED[piece.dtype.itemsize]).astype(jnp.uint32)
    first = _mix(bits ^ key)
    second = _mix(first + np.uint32(0x85EBCA77))
    zero = np.uint32(0)
    # One reduction of both, so that XLA fuses it with the mixing and stores no mixed bits.
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), _add, range(piece.ndim)))


def _add(a: tuple, b: tuple) -> tuple:
    return a[0] + b[0], a[1] + b[1]


def _mix(x: jax.Array) -> jax.Array:
    """A one-to-one map of uint32, in which every bit of `x` changes about half of the result's bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def combine(leaves: Iterable[tuple[str, np.dtype, tuple[int, ...], np.ndarray]]) -> str:
    """The hash of a tree from the (path, type, shape, sums) of its arrays, in any order."""
    lines = sorted(f"{path} {np.dtype(kind)} {tuple(shape)} {total.tolist()}" for path, kind, shape, total in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
