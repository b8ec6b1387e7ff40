"""Qwen2.5-VL's vision tower."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

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
