"""A small random FAE codec: pictures of 32 x 32 pixels, a grid of 4 x 4 tokens, latents of 4 channels."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.codecs.fae import FaeCodec
from starflow2_jax.models.dinov2 import DinoConfig
from starflow2_jax.models.fae import (
    FaeConfig,
    FeatureDecoder,
    FeatureDecoderConfig,
    LatentEncoder,
    PixelDecoder,
    PixelDecoderConfig,
)
from starflow2_jax.models.feature_encoders import ENCODERS

GRID, CHANNELS, PATCH = (4, 4), 4, 8
ENCODER = DinoConfig(layers=1, width=16, heads=2, mlp_hidden=16, grid=4, patch=4, registers=1)
NETWORKS = FaeConfig(
    features=16,
    grid=GRID,
    channels=CHANNELS,
    attention_heads=2,
    attention_head_dim=8,
    feature_decoder=FeatureDecoderConfig(layers=1, heads=2, head_dim=8, mlp_hidden=16),
    pixel_decoder=PixelDecoderConfig(width=16, layers=1, heads=2, head_dim=8, mlp_hidden=16, patch=PATCH),
)
OPTIONS = dict(grid=GRID, channels=CHANNELS, patch=PATCH)  # of the section `codec`, beside kind and path


def randomised(tree: dict, seed: int) -> dict:
    """The tree with every array random, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), tree)


@cache
def codec(seed: int = 0, encoder_kind: str = "vit", encoder=ENCODER, networks: FaeConfig = NETWORKS) -> FaeCodec:
    """The codec, with the parameters of this seed."""
    features, latents = (jnp.zeros((1, 16, n)) for n in (networks.features, networks.channels))
    inputs = {LatentEncoder: features, FeatureDecoder: latents, PixelDecoder: features}
    names = {LatentEncoder: "latent_encoder", FeatureDecoder: "feature_decoder", PixelDecoder: "pixel_decoder"}
    key = jax.random.key(0)
    shapes = {name: jax.eval_shape(m(networks).init, key, inputs[m])["params"] for m, name in names.items()}
    shapes["encoder"] = jax.eval_shape(lambda: ENCODERS[encoder_kind].init(encoder, key))
    mean, std = (0.1, -0.2, 0.3, 0.0), (0.5, 0.6, 0.7, 0.8)
    return FaeCodec(networks, encoder_kind, encoder, GRID, mean, std, randomised(shapes, seed))


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Random pictures (count, side, side, 3) in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)
