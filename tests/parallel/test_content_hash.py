"""The content hash sees every change, and neither the mesh nor the pieces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from starflow2_jax.parallel.content_hash import combine, content_hash, sums
from starflow2_jax.parallel.sharding import make_mesh

RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.standard_normal((3, 16, 24), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32", "bool"])
def test_one_changed_bit(dtype):
    value = np.array(KERNEL[0] * 20, jnp.dtype(dtype))
    seen = {content_hash({"a": value})}
    for bit in range(8 * value.itemsize if dtype != "bool" else 1):
        for place in (0, 7, value.size - 1):
            changed = value.copy()
            changed.reshape(-1).view(f"u{value.itemsize}")[place] ^= 1 << bit
            seen.add(content_hash({"a": changed}))
    assert len(seen) == 1 + 3 * (8 * value.itemsize if dtype != "bool" else 1)


def test_what_counts():
    """Names, types, shapes, order, the sign of zero; two changes do not cancel."""
    zeros, signs = np.zeros((2, 6), np.float32), KERNEL[0].copy()
    signs[2, 3], signs[5, 7] = -signs[2, 3], -signs[5, 7]
    trees = [
        {"a": zeros}, {"b": zeros}, {"a": {"a": zeros}}, {"a": zeros.astype(jnp.bfloat16)}, {"a": zeros.reshape(3, 4)},
        {"a": zeros.T}, {"a": -zeros}, {"a": zeros.astype(np.int32)}, {"a": zeros, "b": zeros}, {"a": zeros[:, :0]}, {"a": zeros[:0]},
        {"a": KERNEL}, {"a": KERNEL[[1, 0, 2]]}, {"a": KERNEL[:, ::-1]}, {"a": KERNEL[0]}, {"a": signs},
        {"a": KERNEL[0], "b": KERNEL[1]}, {"a": KERNEL[1], "b": KERNEL[0]},
    ]  # fmt: skip
    assert len({content_hash(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize(
    "sizes, spec", [((8, 1, 1), ()), ((1, 8, 1), (None, "fsdp")), ((2, 2, 2), (None, "tensor", "fsdp"))]
)
def test_the_mesh_does_not_count(sizes, spec):
    spread = jax.device_put(KERNEL, NamedSharding(make_mesh(*sizes), PartitionSpec(*spec)))
    assert content_hash({"a": spread}) == content_hash({"a": KERNEL})
    program = jax.jit(sums).lower(spread, (0, 0, 0)).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", program)  # sums may be, the array not
    assert all(np.prod([int(n) for n in shape.split(",") if n]) <= 16 for shape in gathered)


def test_pieces_add_up():
    total = np.zeros(2, np.uint32)
    for layer in range(3):
        for row in range(0, 16, 5):
            total += np.asarray(sums(KERNEL[layer : layer + 1, row : row + 5], (layer, row, 0)))
    assert combine([("a", KERNEL.dtype, KERNEL.shape, total)]) == content_hash({"a": KERNEL})


def test_sixty_four_bits_are_refused():
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
        content_hash({"a": np.zeros(3)})
