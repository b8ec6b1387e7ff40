"""DINOv2, a frozen image encoder (arXiv 2304.07193). SigLIP's (arXiv 2303.15343) has its form, see `DinoConfig`."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.fields import check, option
from starflow2_jax.models.layers import Computation, Norm, Transformer, TransformerConfig, dense
from starflow2_jax.models.patches import patchify


@dataclass(frozen=True)
class DinoConfig(Computation):
    """Sizes of the encoder, and the normalisation of its images.

    SigLIP has no class token and no layer scale, and the approximate GELU.
    """

    layers: int = option("layers (L)", least=1)
    width: int = option("channels of the residual stream (E)", least=1)
    heads: int = option("attention heads (H)", least=1)
    mlp_hidden: int = option("hidden channels of the MLP (F)", least=1)
    grid: int = option("side of the learned position embedding, in patches", least=1)
    patch: int = option("side of a patch, in pixels", 14, least=1)
    channels: int = option("channels of a pixel", 3, least=1)
    gated_mlp: bool = option("the MLP is silu(gate) * up, as in the size giant; otherwise it has exact GELU", False)
    tanh_gelu: bool = option("the MLP has GELU's approximation by tanh, as SigLIP's", False)
    class_token: bool = option("a class token comes first", True)
    registers: int = option("register tokens (R)", 0, least=0)
    layer_scale: bool = option("a learned factor per channel on what attention and the MLP add", True)
    antialias: bool = option("filter of the position embedding's resizing, see `resize_matrix`", False)
    qkv_bias: bool = option("queries, keys and values have a bias", True)
    norm_eps: float = option("added to the variance before its root", 1e-6, above=0)
    mean: tuple[float, ...] = option("mean of pixels in 0..1, by channel (ImageNet's)", (0.485, 0.456, 0.406))
    std: tuple[float, ...] = option(
        "standard deviation of pixels in 0..1, by channel (ImageNet's)", (0.229, 0.224, 0.225), above=0
    )

    def __post_init__(self):
        check(self)

    @property
    def transformer(self) -> TransformerConfig:
        """The encoder's layers."""
        return TransformerConfig.of(
            self,
            norm="layer",
            activation="silu" if self.gated_mlp else "gelu_tanh" if self.tanh_gelu else "gelu",
            out_bias=True,
            mlp_bias=True,
        )

    @property
    def leading(self) -> int:
        """Tokens before those of the patches."""
        return self.class_token + self.registers


class DinoFeatures(NamedTuple):
    """Features of each image after the final LayerNorm."""

    patches: jax.Array  # (B, h, w, E)
    class_token: jax.Array  # (B, 0 or 1, E)
    registers: jax.Array  # (B, R, E)


class DinoEncoder(nn.Module):
    """Images in, features of their patches out."""

    cfg: DinoConfig

    @nn.compact
    def __call__(self, images: jax.Array, layers: tuple[int, ...] = ()) -> DinoFeatures:
        """Images (B, h patch, w patch, C), normalised by `preprocess` -> features of h x w patches.

        layers: those whose outputs for the patches (B, h w, E), before any norm, go into the collection "intermediates"
        as
            "layers"; they are counted from 1, in ascending order.
        Raises ValueError for other channels, or sides that are not multiples of the patch.
        """
        c = self.cfg
        B, height, width, C = images.shape
        if C != c.channels:
            raise ValueError(f"images of {C} channels were given; the encoder takes {c.channels}")
        h, w = patch_grid(c, (height, width))
        fresh = nn.initializers.normal(0.02)
        positions = self.param("position_embedding", fresh, (c.class_token + c.grid**2, c.width))
        x = dense(c.width, "patch_embedding", True, c.dtype)(patchify(images, c.patch)).reshape(B, h * w, c.width)
        places = resize_positions(positions[c.class_token :], (h, w), c.antialias)
        x = x + places.reshape(h * w, c.width).astype(x.dtype)
        leading = []
        if c.class_token:
            leading.append((self.param("class_token", fresh, (c.width,)) + positions[0])[None])
        if c.registers:  # they have no position
            leading.append(self.param("registers", fresh, (c.registers, c.width)))
        if leading:
            leading = jnp.concatenate(leading).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(leading, (B, *leading.shape)), x], axis=1)
        everything = jnp.ones((1, 1, 1), bool)  # every token sees every other
        first, outputs, done = c.leading, [], 0
        if layers and not self.is_initializing():
            stack = self.variables["params"]["stack"]
            for last in dict.fromkeys((*layers, c.layers)):
                own = jax.tree.map(lambda p, done=done, last=last: p[done:last], stack)
                part = Transformer(replace(c.transformer, layers=last - done), parent=None)
                x, _ = part.apply({"params": own}, x, None, everything)
                outputs, done = [*outputs, x[:, first:]], last
        else:
            x, _ = Transformer(c.transformer, name="stack")(x, None, everything)
        x = Norm("layer", c.norm_eps, name="norm")(x)
        if not self.is_initializing():
            self.sow("intermediates", "layers", tuple(outputs[: len(layers)]))
        return DinoFeatures(x[:, first:].reshape(B, h, w, c.width), x[:, : c.class_token], x[:, c.class_token : first])


def patch_grid(cfg: DinoConfig, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels -> grid of patches. Raises ValueError if the sides are not multiples of the patch."""
    if size[0] % cfg.patch or size[1] % cfg.patch or not min(size):
        raise ValueError(
            f"an image of {size[0]}x{size[1]} pixels was given; its sides must be multiples of {cfg.patch}"
        )
    return size[0] // cfg.patch, size[1] // cfg.patch


def preprocess(cfg: DinoConfig, pixels: Any) -> Any:
    """Pixels (..., height, width, C) in [-1, 1] -> the encoder's input, normalised by ImageNet's mean and deviation.

    Gray images (C = 1) are repeated to the encoder's channels. Nothing is resized: raises ValueError if the sides are
    not multiples of the patch. Works on NumPy and JAX arrays alike.
    """
    patch_grid(cfg, pixels.shape[-3:-1])
    return ((pixels + 1) / 2 - np.asarray(cfg.mean, np.float32)) / np.asarray(cfg.std, np.float32)


def resize_positions(
    table: jax.Array, size: tuple[int, int], antialias: bool, learned: tuple[int, int] | None = None
) -> jax.Array:
    """Position embedding (N, E) of the grid `learned`, None: a square, resized to (h, w, E) by a bicubic filter, in
    fp32.
    """
    learned = learned or (round(table.shape[0] ** 0.5),) * 2
    table = table.astype(jnp.float32).reshape(*learned, -1)
    if size == learned:
        return table
    rows, columns = (resize_matrix(old, new, antialias) for old, new in zip(learned, size, strict=True))
    return jnp.einsum("hi,wj,ije->hwe", rows, columns, table, precision="highest")


def resize_matrix(size: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix (new, size) of PyTorch's bicubic resizing along one axis, with align_corners=False.

    Without `antialias`: Keys' kernel with a = -0.75 and its edges repeated, as in Dinov2Model of `transformers`. With
    it: a = -0.5, the kernel widened if the axis shrinks and cut off at the edges, as in Dinov2WithRegistersModel.
    """
    scale = size / new
    centers = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    if antialias:
        weights = _keys((np.arange(size) - centers) / max(scale, 1), -0.5)
        weights = weights / weights.sum(1, keepdims=True)
    else:
        taps = np.floor(centers).astype(int) + np.arange(-1, 3)
        weights = np.zeros((new, size))
        np.add.at(weights, (np.arange(new)[:, None], taps.clip(0, size - 1)), _keys(taps - centers, -0.75))
    return weights.astype(np.float32)


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE Trans. ASSP 29, 1981) at the distances x."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
