"""FAE's networks: the published parameter counts by shape, and small networks against their definition in PyTorch."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from starflow2_jax.models.fae import (
    FaeConfig,
    FeatureDecoder,
    LatentEncoder,
    PixelDecoder,
)

PAPER = FaeConfig()
PUBLISHED = {LatentEncoder: (1536, 38_166_592), FeatureDecoder: (32, 170_428_416), PixelDecoder: (1536, 305_360_896)}


@pytest.mark.parametrize("module", PUBLISHED)
def test_published_parameter_counts(module):
    channels, count = PUBLISHED[module]
    init = partial(module(PAPER).init, jax.random.key(0))
    params = jax.eval_shape(init, jnp.zeros((1, 256, channels)))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_paper_shapes():
    """Features of 256 tokens become a Gaussian of 32 channels, and a picture of 256 x 256; other grids, other pictures."""

    def out(module, grid, channels, *args):
        tokens = jnp.zeros((2, grid[0] * grid[1], channels))
        shapes = jax.eval_shape(lambda: module(PAPER).init_with_output(jax.random.key(0), tokens, *args)[0])
        return jax.tree.map(lambda x: x.shape, shapes)

    assert out(LatentEncoder, (16, 16), 1536) == ((2, 256, 32), (2, 256, 32))
    assert out(FeatureDecoder, (16, 16), 32) == (2, 256, 1536)
    assert out(PixelDecoder, (16, 16), 1536) == (2, 256, 256, 3)
    for side in (384, 512):
        grid = (side // 16, side // 16)
        assert out(FeatureDecoder, grid, 32, grid) == (2, grid[0] ** 2, 1536)
        assert out(PixelDecoder, grid, 1536, grid) == (2, side, side, 3)
    with pytest.raises(ValueError, match="576 tokens were given; a grid of 16x16 has 256"):
        out(PixelDecoder, (24, 24), 1536)
