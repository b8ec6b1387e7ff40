"""FAE's networks: the published parameter counts by shape, and small networks against their definition in PyTorch."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_fae
import torch

from starflow2_jax.models.dinov2 import resize_positions
from starflow2_jax.models.fae import FaeConfig, FeatureDecoder, LatentEncoder, PixelDecoder, rotary_angles

PAPER = FaeConfig()
TWO = replace(  # layers of each decoder
    tiny_fae.NETWORKS,
    feature_decoder=replace(tiny_fae.NETWORKS.feature_decoder, layers=2),
    pixel_decoder=replace(tiny_fae.NETWORKS.pixel_decoder, layers=2),
)
PUBLISHED = {LatentEncoder: (1536, 38_166_592), FeatureDecoder: (32, 170_428_416), PixelDecoder: (1536, 305_360_896)}


@pytest.mark.parametrize("module", PUBLISHED)
def test_published_parameter_counts(module):
    channels, count = PUBLISHED[module]
    init = partial(module(PAPER).init, jax.random.key(0))
    params = jax.eval_shape(init, jnp.zeros((1, 256, channels)))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_paper_shapes():
    """Features of 256 tokens become a Gaussian of 32 channels, and a picture of 256 x 256; other grids, other
    pictures.
    """

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


def torch_of(tree) -> dict:
    return {key: torch_of(value) if isinstance(value, dict) else torch.tensor(value) for key, value in tree.items()}


def linear(x: torch.Tensor, p: dict, axes: int = 1) -> torch.Tensor:
    """x times a kernel whose first `axes` axes are the input's last ones."""
    inputs = p["kernel"].shape[:axes]
    flat = x.reshape(*x.shape[: x.ndim - axes], -1) @ p["kernel"].reshape(int(np.prod(inputs)), -1)
    return flat.reshape(*flat.shape[:-1], *p["kernel"].shape[axes:]) + p["bias"]


def rotated(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """x (B, N, H, K), as complex numbers times exp(i angle): the first quarter of pairs by row, the second by
    column.
    """
    pairs = x.shape[-1] // 2
    rates = 10_000.0 ** (-2 * torch.arange(pairs // 2, dtype=torch.float64) / pairs)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    angles = torch.stack([torch.cat([row * rates, column * rates]) for row, column in places])
    turned = torch.complex(x[..., :pairs].double(), x[..., pairs:].double()) * torch.exp(1j * angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def layers(x: torch.Tensor, stack: dict, norm, grid=None) -> torch.Tensor:
    """Pre-norm layers whose parameters are stacked along the first axis."""
    for i in range(len(stack["mlp"]["down"]["bias"])):
        p = jax.tree.map(lambda a, i=i: a[i], stack)
        h = norm(x, p["attention_norm"])
        q, k, v = (linear(h, p["attention"][name]) for name in ("query", "key", "value"))
        if grid:
            q, k = rotated(q, grid), rotated(k, grid)
        x = x + linear(attention(q, k, v), p["attention"]["out"], 2)
        h = norm(x, p["mlp_norm"])
        act = torch.nn.functional.silu(linear(h, p["mlp"]["gate"])) * linear(h, p["mlp"]["up"])
        x = x + linear(act, p["mlp"]["down"])
    return x


def rms(x, p):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], p["scale"], 1e-6)


def layer_norm(x, p):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)


def test_networks_against_their_definition_in_pytorch():
    """Each network, of random parameters, against its definition with PyTorch's own functions."""
    made, grid = tiny_fae.codec(networks=TWO), tiny_fae.GRID
    weights = {name: torch_of(made.weights[name]) for name in ("latent_encoder", "feature_decoder", "pixel_decoder")}
    rng = np.random.default_rng(0)
    features, latents = (rng.standard_normal((2, 16, n)).astype(np.float32) for n in (16, 4))

    p = weights["latent_encoder"]
    q, k, v, skip = linear(torch.from_numpy(features), p["joint"]).unbind(2)
    moments = linear(torch.nn.functional.gelu(skip + attention(q, k, v)), p["moments"], 2)
    got = LatentEncoder(TWO).apply({"params": made.weights["latent_encoder"]}, features)
    np.testing.assert_allclose(np.concatenate(got, -1), moments, atol=1e-4)

    p = weights["feature_decoder"]
    x = linear(torch.from_numpy(latents), p["embedding"]) + p["position_embedding"]
    wanted = rms(layers(x, p["stack"]["layers"], rms, grid), p["norm"])
    got = FeatureDecoder(TWO).apply({"params": made.weights["feature_decoder"]}, latents)
    np.testing.assert_allclose(got, wanted, atol=1e-4)

    p = weights["pixel_decoder"]
    x = linear(torch.from_numpy(features), p["embedding"]) + p["position_embedding"]
    x = linear(layer_norm(layers(x, p["stack"]["layers"], layer_norm), p["norm"]), p["pixels"])
    squares = x.reshape(2, *grid, 3, tiny_fae.PATCH, tiny_fae.PATCH).permute(0, 1, 4, 2, 5, 3)
    got = PixelDecoder(TWO).apply({"params": made.weights["pixel_decoder"]}, features)
    np.testing.assert_allclose(got, squares.reshape(2, 32, 32, 3), atol=1e-4)


def test_positions_of_another_grid_are_stretched():
    """Four times as many tokens have the same mean position, learned and rotary, as those that they come from."""
    table = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    image = torch.from_numpy(table).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(image, (4, 8), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    got = resize_positions(jnp.asarray(table.reshape(8, 5)), (4, 8), antialias=False, learned=(2, 4))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    angles = rotary_angles((2, 4), (4, 8), 8).reshape(2, 2, 4, 2, 4)
    np.testing.assert_allclose(angles.mean((1, 3)), rotary_angles((2, 4), (2, 4), 8).reshape(2, 4, 4), atol=1e-6)
    np.testing.assert_allclose(np.diff(angles[0, :, 0, 0, 0]), 0.5)  # half a row of the learned grid
