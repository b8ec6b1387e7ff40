"""The table of frozen image encoders whose features a codec compresses: pixels in, one token of features a place
out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models.dinov2 import DinoConfig, DinoEncoder, preprocess, resize_matrix
from starflow2_jax.models.fae import Grid
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.qwen_vision import VisionConfig, VisionTower
from starflow2_jax.sequence import VisionInput


@dataclass(frozen=True)
class EncoderSizes:
    """What of an encoder decides about the FLOP of a picture."""

    stack: TransformerConfig
    tokens: int  # of the stack
    visible: float  # tokens that one token attends to, averaged over the layers
    before: float  # parameters times tokens of the maps before the stack
    after: float = 0.0  # the same of those after it


@dataclass(frozen=True)
class FeatureEncoder:
    """A row of ENCODERS.

    config: a frozen dataclass of JSON values. width: a config -> channels of its features (C). init: (config, random
    key) -> parameters. features: (config, parameters, pixels (B, H, W, 3) in [-1, 1], grid (h, w)) -> features (B, h w,
    C), in the config's `dtype`; pixels of another size than the grid asks for are resized first. layers: the same
    arguments and the numbers of layers, counted from 1 -> features and the outputs (B, h w, E) of these layers; None:
    the encoder does not give them. sizes: a config and the grid -> what FLOP are counted from.
    """

    config: type
    width: Callable[[Any], int]
    init: Callable[[Any, jax.Array], dict]
    features: Callable[[Any, dict, jax.Array, Grid], jax.Array]
    sizes: Callable[[Any, Grid], EncoderSizes]
    layers: Callable[[Any, dict, jax.Array, Grid, tuple[int, ...]], tuple[jax.Array, tuple[jax.Array, ...]]] | None = (
        None
    )


def resized(pixels: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pixels (B, H, W, C) -> (B, *size, C) by PyTorch's bicubic filter without antialiasing, in fp32."""
    if pixels.shape[1:3] == size:
        return pixels
    rows, columns = (resize_matrix(old, new, False) for old, new in zip(pixels.shape[1:3], size, strict=True))
    return jnp.einsum("hi,wj,bijc->bhwc", rows, columns, pixels, precision="highest")


def _dino_init(cfg: DinoConfig, key: jax.Array) -> dict:
    side = cfg.grid * cfg.patch
    return dict(DinoEncoder(cfg).init(key, jnp.zeros((1, side, side, cfg.channels)))["params"])


def _dino_features(cfg: DinoConfig, params: dict, pixels: jax.Array, grid: Grid) -> jax.Array:
    """Patch tokens after the final LayerNorm, without class and register tokens."""
    return _dino_layers(cfg, params, pixels, grid, ())[0]


def _dino_layers(
    cfg: DinoConfig, params: dict, pixels: jax.Array, grid: Grid, layers: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    images = preprocess(cfg, resized(pixels, (grid[0] * cfg.patch, grid[1] * cfg.patch)))
    found: Any = DinoEncoder(cfg).apply({"params": params}, images, layers, mutable=["intermediates"])
    output, beside = found
    return output.patches.reshape(len(images), -1, cfg.width), beside["intermediates"]["layers"][0]


def _dino_sizes(cfg: DinoConfig, grid: Grid) -> EncoderSizes:
    tokens, patches = grid[0] * grid[1] + cfg.leading, grid[0] * grid[1]
    return EncoderSizes(cfg.transformer, tokens, tokens, cfg.channels * cfg.patch**2 * cfg.width * patches)


def _tower_init(cfg: VisionConfig, key: jax.Array) -> dict:
    side = cfg.patch * cfg.merge
    pixels = jnp.zeros((1, side, side, cfg.channels))
    return dict(VisionTower(cfg).init(key, _tower_input(cfg, pixels, (1, 1)))["params"])


def _tower_input(cfg: VisionConfig, pixels: jax.Array, grid: Grid) -> VisionInput:
    """Pixels (B, h side, w side, C), with side = patch merge, as the tower reads them: one image a row."""
    places: Any = {name: np.broadcast_to(x, (len(pixels), *x.shape)) for name, x in cfg.places(*grid).items()}
    x = ((pixels + 1) / 2 - np.asarray(cfg.mean, np.float32)) / np.asarray(cfg.std, np.float32)
    return VisionInput(jax.vmap(cfg.patches)(x), **places, image=jnp.ones_like(places["window"]))


def _tower_features(cfg: VisionConfig, params: dict, pixels: jax.Array, grid: Grid) -> jax.Array:
    """Merged tokens, as the vision-language model reads them."""
    side = cfg.patch * cfg.merge
    images = resized(pixels, (grid[0] * side, grid[1] * side))
    tokens: Any = VisionTower(cfg).apply({"params": params}, _tower_input(cfg, images, grid))
    return tokens


def _tower_sizes(cfg: VisionConfig, grid: Grid) -> EncoderSizes:
    merged = grid[0] * grid[1]
    patches = merged * cfg.merge**2
    visible = cfg.visible_patches(patches)
    before, after = cfg.embedding_parameters * patches, cfg.merger_parameters * merged
    return EncoderSizes(cfg.transformer, patches, visible, before, after)


DINO = FeatureEncoder(DinoConfig, lambda cfg: cfg.width, _dino_init, _dino_features, _dino_sizes, _dino_layers)
ENCODERS: dict[str, FeatureEncoder] = {
    "dinov2": DINO,
    "siglip": DINO,  # of the same form
    "vit": DINO,  # a small one of the same form, trained here
    "vlm": FeatureEncoder(VisionConfig, lambda cfg: cfg.out_width, _tower_init, _tower_features, _tower_sizes),
}
