"""Qwen2.5-VL's vision tower, and how an image becomes the patches that it sees."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as Pillow

from starflow2_jax.errors import UserError
from starflow2_jax.fields import check, option
from starflow2_jax.models.layers import ACTIVATIONS, Computation, Norm, Transformer, TransformerConfig, dense
from starflow2_jax.sequence import VisionInput


@dataclass(frozen=True)
class VisionConfig(Computation):
    """Sizes of the tower and of the images it sees. Raises UserError for sizes that do not fit each other."""

    layers: int = option("layers (L)", least=1, most=4096)
    width: int = option("channels of the residual stream (E)", least=1)
    heads: int = option("attention heads (H)", least=1)
    mlp_hidden: int = option("hidden channels of the MLP (F)", least=1)
    out_width: int = option("channels of a merged token: the text decoder's width", least=1)
    patch: int = option("side of a patch, in pixels", 14, least=1)
    merge: int = option("merge x merge patches become one token", 2, least=1)
    temporal_patch: int = option("frames of a patch; a still image is repeated", 2, least=1)
    channels: int = option("channels of a pixel", 3, least=1)
    window: int = option("side of an attention window, in pixels", 112, least=1)
    full_attention_layers: tuple[int, ...] = option(
        "layers (from 0) that attend over the whole image instead of windows", (7, 15, 23, 31), least=0
    )
    min_pixels: int = option("least pixels of a resized image", 56 * 56, least=1)
    max_pixels: int = option("most pixels of a resized image", 28 * 28 * 1280, least=1)
    mean: tuple[float, ...] = option("mean of pixels in 0..1, by channel (CLIP's)", (0.48145466, 0.4578275, 0.40821073))
    std: tuple[float, ...] = option(
        "standard deviation of pixels in 0..1, by channel (CLIP's)", (0.26862954, 0.26130258, 0.27577711), above=0
    )
    rotary_theta: float = option("base of the rotary frequencies", 1e4, above=0)
    norm_eps: float = option("added to the mean square before its root", 1e-6, above=0)
    scan: bool = option("the layers' parameters are stacked and scanned over; False: each has its own", True)

    def __post_init__(self):
        check(self)
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(f"mean and std must have one entry for each of the {self.channels} channels")
        if self.min_pixels > self.max_pixels:
            raise UserError(f"min_pixels={self.min_pixels} must not be above max_pixels={self.max_pixels}")
        if (head := self.transformer.head) % 4:
            raise UserError(f"heads have {head} channels (width / heads), but take a multiple of 4 for row and column")

    @property
    def patch_width(self) -> int:
        """Numbers in one patch: channels, time, rows and columns."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def transformer(self) -> TransformerConfig:
        """The tower's layers."""
        return TransformerConfig.of(
            self, norm="rms", activation="silu", gated_mlp=True, qkv_bias=True, out_bias=True, mlp_bias=True
        )

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the matrix that embeds a patch."""
        return self.patch_width * self.width

    @property
    def merger_parameters(self) -> int:
        """Parameters of the two matrices that make one merged token out of merge^2 patches."""
        merged = self.width * self.merge**2
        return merged * (merged + self.out_width)

    def visible_patches(self, patches: int) -> float:
        """How many of an image's `patches` one patch attends to, averaged over windowed and full layers."""
        window = min(patches, max(self.window // (self.patch * self.merge), 1) ** 2 * self.merge**2)
        full = len(self.full_attention_layers) / self.layers
        return full * patches + (1 - full) * window

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of an image -> of what the tower sees (Qwen2-VL's rule).

        Sides become multiples of patch x merge, the area lies between min_pixels and max_pixels, and the aspect ratio
        is kept as far as those allow. Raises ValueError for an image more than 200 times as long as wide.
        """
        side, area = self.patch * self.merge, math.prod(size)
        if max(size) > 200 * min(size):
            raise ValueError(
                f"an image of {size[0]}x{size[1]} pixels was given; the vision tower takes none that is over 200 times "
                "as long as wide"
            )
        height, width = (round(s / side) * side for s in size)
        if height * width > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            height, width = (max(side, math.floor(s / shrink / side) * side) for s in size)
        elif height * width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            height, width = (math.ceil(s * grow / side) * side for s in size)
        return height, width

    def merged_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels, before resizing -> grid of merged tokens. Raises ValueError as `resized` does."""
        height, width = self.resized(size)
        return height // (self.patch * self.merge), width // (self.patch * self.merge)

    def bounded(self, least: int | None = None, most: int | None = None) -> Self:
        """The same tower with other bounds on the pixels of a resized image; None: as now. Raises UserError if they
        cross.
        """
        return replace(self, min_pixels=least or self.min_pixels, max_pixels=most or self.max_pixels)

    def preprocess(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Pixels (height, width, C) in [-1, 1] -> "patches" (P, patch width), "coordinates" (P, 2), "window" (P,).

        A gray image is repeated to the tower's channels. If an image must be resized, it is rounded to 8-bit levels
        and resized with a bicubic filter. The patches of one merged token are neighbours; merged tokens are in raster
        order.
        """
        height, width = self.resized(pixels.shape[:2])
        h, w = height // (self.patch * self.merge), width // (self.patch * self.merge)
        if pixels.shape[:2] != (height, width):
            levels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
            planes = [Pillow.fromarray(levels[..., i]) for i in range(levels.shape[-1])]
            planes = [plane.resize((width, height), Pillow.Resampling.BICUBIC) for plane in planes]
            pixels = np.stack([np.asarray(plane, np.float32) for plane in planes], axis=-1) / 127.5 - 1
        pixels = np.broadcast_to((pixels + 1) / 2, (height, width, self.channels))
        patches = self.patches((pixels - np.asarray(self.mean)) / np.asarray(self.std))
        return {"patches": patches.astype(np.float32), **self.places(h, w)}

    def patches(self, pixels: Any) -> Any:
        """Normalised pixels (h merge patch, w merge patch, C), NumPy or JAX -> patches (P, patch width) as in
        `preprocess`.
        """
        m, p = self.merge, self.patch
        h, w = (side // (m * p) for side in pixels.shape[:2])
        x = pixels.reshape(h, m, p, w, m, p, self.channels).transpose(0, 3, 1, 4, 6, 2, 5)  # h w m m C p p
        return x[:, :, :, :, :, None].repeat(self.temporal_patch, 5).reshape(-1, self.patch_width)

    def places(self, h: int, w: int) -> dict[str, np.ndarray]:
        """ "coordinates" (P, 2) and "window" (P,) of the patches of h x w merged tokens."""
        m, p = self.merge, self.patch
        rows, columns = np.meshgrid(np.arange(h * m), np.arange(w * m), indexing="ij")
        coordinates = np.stack([rows, columns], -1).reshape(h, m, w, m, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
        side = max(self.window // (p * m), 1) * m  # of a window, in patches
        window = coordinates[:, 0] // side * (-(-w * m // side)) + coordinates[:, 1] // side
        return {"coordinates": coordinates.astype(np.int32), "window": window.astype(np.int32)}


class VisionTower(nn.Module):
    """Patches of one or several images in, merged tokens out."""

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
