"""DINOv2's resizing of position embeddings and its preprocessing; its features are compared in tests/weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from starflow2_jax.models.dinov2 import DinoConfig, DinoEncoder, preprocess, resize_positions

CONFIG = DinoConfig(layers=2, width=16, heads=2, mlp_hidden=24, grid=3, patch=4, registers=2)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid, size", [(37, (16, 16)), (37, (37, 36)), (16, (37, 20)), (5, (1, 23)), (2, (3, 2))])
def test_positions_are_resized_as_pytorch_does(grid, size, antialias):
    table = np.random.default_rng(0).standard_normal((grid**2, 3)).astype(np.float32)
    image = torch.from_numpy(table).reshape(1, grid, grid, 3).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(image, size, mode="bicubic", align_corners=False, antialias=antialias)
    got = resize_positions(jnp.asarray(table), size, antialias)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0), atol=1e-5)


def test_preprocessing():
    """Preprocessing against its definition on bytes, for gray and coloured images, NumPy and JAX arrays."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3))
    want = (pixels / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    ours = (pixels / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(preprocess(CONFIG, ours), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x: preprocess(CONFIG, x))(ours), want, atol=1e-5)
    gray = preprocess(CONFIG, ours[..., :1])
    np.testing.assert_allclose(gray, preprocess(CONFIG, ours[..., [0, 0, 0]]), atol=1e-6)


def test_images_that_do_not_fit():
    init = DinoEncoder(CONFIG).init
    with pytest.raises(ValueError, match="10x8 pixels was given; its sides must be multiples of 4"):
        preprocess(CONFIG, np.zeros((10, 8, 3)))
    with pytest.raises(ValueError, match="8x6 pixels was given"):
        init(jax.random.key(0), jnp.zeros((1, 8, 6, 3)))
    with pytest.raises(ValueError, match="images of 1 channels were given; the encoder takes 3"):
        init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_bfloat16():
    """Half precision and rematerialised layers stay near fp32 and come out as bfloat16."""
    images = np.random.default_rng(0).standard_normal((2, 8, 16, 3)).astype(np.float32)
    params = jax.jit(DinoEncoder(CONFIG).init)(jax.random.key(0), images)
    exact = jax.jit(DinoEncoder(CONFIG).apply)(params, images)
    half = jax.jit(DinoEncoder(replace(CONFIG, dtype="bfloat16", remat="full")).apply)(params, images)
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a, b.astype(np.float32), atol=0.1)
