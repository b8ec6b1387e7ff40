"""Qwen2.5-VL's vision tower and its preprocessing of still images."""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as Pillow

from starflow2_jax.errors import UserError, require_positive
from starflow2_jax.models.layers import ACTIVATIONS, Norm, Transformer, TransformerConfig, dense
from starflow2_jax.sequence import VisionInput


@dataclass(frozen=True)
class VisionConfig:
    """Raises UserError for sizes that do not fit each other."""

    layers: int
    width: int
    heads: int
    mlp_hidden: int
    out_width: int  # the text decoder's width
    patch: int = 14
    merge: int = 2  # merge x merge patches become one token
    temporal_patch: int = 2  # a still image is repeated
    channels: int = 3
    window: int = 112  # side of an attention window, in pixels
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    min_pixels: int = 56 * 56  # of a resized image
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of pixels in 0..1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rotary_theta: float = 1e4
    norm_eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    unroll: int = 1

    def __post_init__(self):
        require_positive(patch=self.patch, merge=self.merge, temporal_patch=self.temporal_patch, window=self.window)
        if (head := self.transformer.head) % 4:
            raise UserError(f"heads have {head} channels (width / heads), but take a multiple of 4 for row and column")

    @property
    def patch_width(self) -> int:
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def transformer(self) -> TransformerConfig:
        return TransformerConfig(
            layers=self.layers, width=self.width, heads=self.heads, mlp_hidden=self.mlp_hidden, norm="rms",
            norm_eps=self.norm_eps, activation="silu", gated_mlp=True, qkv_bias=True, out_bias=True, mlp_bias=True,
            dtype=self.dtype, remat=self.remat, scan=self.scan, unroll=self.unroll,
        )  # fmt: skip


class VisionTower(nn.Module):
    cfg: VisionConfig

    @nn.compact
    def __call__(self, images: VisionInput) -> jax.Array:
        """Patches (B, P, patch width) -> merged tokens (B, P / merge^2, out_width)."""
        c = self.cfg
        x = dense(c.width, "patch_embedding", False, c.dtype)(images.patches)
        pairs = c.width // c.heads // 4  # a quarter of the head: rotary frequencies of one axis
        frequencies = c.rotary_theta ** (-jnp.arange(pairs) / pairs)
        angles = (images.coordinates[..., None].astype(jnp.float32) * frequencies).reshape(*x.shape[:2], 2 * pairs)
        masks = jnp.stack([ids[:, :, None] == ids[:, None, :] for ids in (images.window, images.image)])
        full = jnp.array([int(i in c.full_attention_layers) for i in range(c.layers)])
        x, _ = Transformer(c.transformer, name="stack")(x, angles, masks, mask_of_layer=full)
        x = Norm("rms", c.norm_eps, name="merge_norm")(x)
        B, P, E = x.shape
        x = x.reshape(B, P // c.merge**2, E * c.merge**2)
        x = ACTIVATIONS["gelu"](dense(E * c.merge**2, "merge_in", True, c.dtype)(x))
        return dense(c.out_width, "merge_out", True, c.dtype)(x)


def resized(cfg: VisionConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Image size in pixels -> the size that the tower sees (Qwen2-VL's rule).

    Sides become multiples of patch x merge, the area comes within min_pixels and max_pixels, the aspect about stays.
    Raises ValueError for images more than 200 times as long as wide.
    """
    side, area = cfg.patch * cfg.merge, math.prod(size)
    if max(size) > 200 * min(size):
        raise ValueError(
            f"an image of {size[0]}x{size[1]} pixels was given; the vision tower takes none that is over 200 times as long "
            "as wide"
        )
    height, width = (round(s / side) * side for s in size)
    if height * width > cfg.max_pixels:
        shrink = math.sqrt(area / cfg.max_pixels)
        height, width = (max(side, math.floor(s / shrink / side) * side) for s in size)
    elif height * width < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / area)
        height, width = (math.ceil(s * grow / side) * side for s in size)
    return height, width


def merged_grid(cfg: VisionConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Image size in pixels, before resizing -> grid of merged tokens. Raises ValueError as `resized` does."""
    height, width = resized(cfg, size)
    return height // (cfg.patch * cfg.merge), width // (cfg.patch * cfg.merge)


def preprocess(cfg: VisionConfig, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels (height, width, C) in [-1, 1] -> patches (P, patch width), coordinates (P, 2), window (P,) from 0.

    Gray images are repeated to the tower's channels. An image is resized, where it has to be, as 8-bit levels with a
    bicubic filter. Patches come merge group by merge group, in raster order.
    """
    height, width = resized(cfg, pixels.shape[:2])
    h, w = height // (cfg.patch * cfg.merge), width // (cfg.patch * cfg.merge)
    if pixels.shape[:2] != (height, width):
        levels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
        planes = [Pillow.fromarray(levels[..., i]) for i in range(levels.shape[-1])]
        planes = [plane.resize((width, height), Pillow.Resampling.BICUBIC) for plane in planes]
        pixels = np.stack([np.asarray(plane, np.float32) for plane in planes], axis=-1) / 127.5 - 1
    pixels = np.broadcast_to((pixels + 1) / 2, (height, width, cfg.channels))
    x = (pixels - np.asarray(cfg.mean)) / np.asarray(cfg.std)
    m, p = cfg.merge, cfg.patch
    x = x.reshape(h, m, p, w, m, p, cfg.channels).transpose(0, 3, 1, 4, 6, 2, 5)  # h w m m C p p
    x = np.repeat(x[:, :, :, :, :, None], cfg.temporal_patch, axis=5)
    rows, columns = np.meshgrid(np.arange(h * m), np.arange(w * m), indexing="ij")
    coordinates = np.stack([rows, columns], -1).reshape(h, m, w, m, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    side = max(cfg.window // (p * m), 1) * m  # of a window, in patches
    window = coordinates[:, 0] // side * (-(-w * m // side)) + coordinates[:, 1] // side
    return {
        "patches": x.reshape(-1, cfg.patch_width).astype(np.float32),
        "coordinates": coordinates.astype(np.int32),
        "window": window.astype(np.int32),
    }
