"""FAE: features of a frozen image encoder <-> a small Gaussian latent, and features -> pixels (arXiv 2512.07829).

Shapes and parameter counts are published. Layouts marked [i] are inferred: they give exactly these counts. [ours] marks
choices of this project.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.errors import UserError
from starflow2_jax.fields import check, option
from starflow2_jax.models.attention import attend
from starflow2_jax.models.dinov2 import resize_positions
from starflow2_jax.models.layers import Computation, Norm, Transformer, TransformerConfig, dense, gelu, widened
from starflow2_jax.models.patches import unpatchify
from starflow2_jax.parallel.sharding import constrain

POSITIONS = ("learned", "sincos")
SINCOS_GRID = 16  # fixed positions of any grid are scaled to this many rows and columns
THETA = 1e4  # base of the frequencies of rotary and of fixed positions
Grid = tuple[int, int]


@dataclass(frozen=True)
class FeatureDecoderConfig:
    """Sizes of the network that makes features from latents."""

    layers: int = option("layers (L)", 6, least=1)
    heads: int = option("attention heads (H)", 24, least=1)
    head_dim: int = option("channels of a head (K), a multiple of 4 for the rotation by row and column", 64, least=4)
    mlp_hidden: int = option("hidden channels of the gated MLP (F)", 4096, least=1)

    def __post_init__(self):
        check(self)
        if self.head_dim % 4:
            raise UserError(
                f"head_dim={self.head_dim} must be a multiple of 4, because rows and columns rotate pairs of channels"
            )


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of the network that makes pixels from features. The defaults are FAE's; RAE's decoder sets the last
    five.
    """

    width: int = option("channels of the residual stream (E)", 1024, least=1)
    layers: int = option("layers (L)", 24, least=1)
    heads: int = option("attention heads (H)", 16, least=1)
    head_dim: int = option("channels of a head (K)", 64, least=1)
    mlp_hidden: int = option("hidden channels of the MLP (F)", 2736, least=1)
    patch: int = option("side of the square of pixels that a token becomes", 16, least=1)
    image_channels: int = option("channels of a pixel", 3, least=1)
    gated_mlp: bool = option("the MLP is silu(gate) * up; otherwise it has exact GELU", True)
    norm_eps: float = option("added to the variance before its root", 1e-6, above=0)
    positions: str = option(
        "learned: a table for the grid; sincos: fixed sines and cosines", "learned", choices=POSITIONS
    )
    class_token: bool = option("a learned token, which becomes no pixels, comes first", False)
    mean: tuple[float, ...] = option("added to the scaled output, by channel, in pixels of 0..1", (0.5, 0.5, 0.5))
    std: tuple[float, ...] = option("factor of the output, by channel, in pixels of 0..1", (0.5, 0.5, 0.5), above=0)

    def __post_init__(self):
        check(self)
        if not len(self.mean) == len(self.std) == self.image_channels:
            raise UserError(f"mean and std must have one entry for each of the {self.image_channels} channels")
        if self.positions == "sincos" and self.width % 4:
            raise UserError(f"width={self.width} must be a multiple of 4 for sines and cosines of rows and columns")


@dataclass(frozen=True)
class FaeConfig(Computation):
    """The codec's three networks. N = h w tokens of features; learned positions of another grid are resized."""

    features: int = option("channels of the frozen encoder's features (C)", 1536, least=1)
    grid: tuple[int, int] = option("rows and columns of tokens that positions are learned for", (16, 16), least=1)
    channels: int = option("channels of a latent token (D); 0: none, only a pixel decoder on features", 32, least=0)
    attention_heads: int = option("heads of the latent encoder's attention", 24, least=1)
    attention_head_dim: int = option("channels of such a head", 256, least=1)
    feature_decoder: FeatureDecoderConfig = option("makes features from latents", FeatureDecoderConfig())
    pixel_decoder: PixelDecoderConfig = option("makes pixels from features", PixelDecoderConfig())

    def __post_init__(self):
        check(self)

    def stack(self, part: FeatureDecoderConfig | PixelDecoderConfig, width: int, **how: Any) -> TransformerConfig:
        """The layers of a decoder, with biases everywhere."""
        return TransformerConfig(
            layers=part.layers,
            width=width,
            heads=part.heads,
            head_dim=part.head_dim,
            mlp_hidden=part.mlp_hidden,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
            **how,
        )


class LatentEncoder(nn.Module):
    """Features -> the Gaussian of each latent token, by one attention layer.

    [i] One biased map makes queries, keys, values and a skip; GELU follows their sum; a biased map ends.
    """

    cfg: FaeConfig

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (B, N, C) -> mean and log-variance (B, N, D), in fp32 at least."""
        c = self.cfg
        heads = (4, c.attention_heads, c.attention_head_dim)
        x = dense(heads, "joint", True, c.dtype)(constrain(features, "batch", "sequence", "embed"))
        q, k, v, skip = (x[:, :, i] for i in range(4))
        x = gelu(skip + attend(q, k, v, jnp.ones((1, 1, 1), bool)))  # every token sees every other
        x = dense(2 * c.channels, "moments", True, c.dtype, axis=(-2, -1))(x)
        mean, log_variance = jnp.split(widened(x), 2, axis=-1)
        return mean, log_variance


class FeatureDecoder(nn.Module):
    """Latents -> features.

    [i] A biased map to the features' width, learned positions, layers with RMSNorm and SwiGLU, a final RMSNorm. Heads
    have rotary positions of rows and columns, in units of the grid that the learned positions belong to [ours].
    """

    cfg: FaeConfig

    @nn.compact
    def __call__(self, latents: jax.Array, grid: Grid | None = None) -> jax.Array:
        """Latents (B, N, D) of the grid (h, w), None: that of the config -> features (B, N, C)."""
        c, part = self.cfg, self.cfg.feature_decoder
        grid = require_grid(latents, grid or c.grid)
        x = dense(c.features, "embedding", True, c.dtype)(constrain(latents, "batch", "sequence", "embed"))
        x = x + _learned_positions(self, c, grid, c.features).astype(x.dtype)
        angles = jnp.broadcast_to(rotary_angles(c.grid, grid, part.head_dim), (len(x), x.shape[1], part.head_dim // 2))
        stack = c.stack(part, c.features, norm="rms", activation="silu", gated_mlp=True)
        x, _ = Transformer(stack, name="stack")(x, angles, jnp.ones((1, 1, 1), bool))
        return Norm("rms", name="norm")(x)


class PixelDecoder(nn.Module):
    """Features -> pixels.

    [i] A biased map to the decoder's width, positions, layers with LayerNorm, a final LayerNorm, a biased map to the
    pixels of each token.
    """

    cfg: FaeConfig

    @nn.compact
    def __call__(self, features: jax.Array, grid: Grid | None = None) -> jax.Array:
        """Features (B, N, C) of the grid (h, w), None: that of the config -> pixels (B, h patch, w patch, image
        channels).

        Pixels are in fp32 at least, about -1..1, not clipped.
        """
        c, part = self.cfg, self.cfg.pixel_decoder
        h, w = grid = require_grid(features, grid or c.grid)
        x = dense(part.width, "embedding", True, c.dtype)(constrain(features, "batch", "sequence", "embed"))
        if part.positions == "learned":
            positions = _learned_positions(self, c, grid, part.width)
        else:
            positions = jnp.asarray(sincos_positions(grid, part.width))
        x = x + positions.astype(x.dtype)
        if part.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (part.width,)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, part.width)), x], axis=1)
        stack = c.stack(
            part,
            part.width,
            norm="layer",
            norm_eps=part.norm_eps,
            activation="silu" if part.gated_mlp else "gelu",
            gated_mlp=part.gated_mlp,
        )
        x, _ = Transformer(stack, name="stack")(x, None, jnp.ones((1, 1, 1), bool))
        x = Norm("layer", part.norm_eps, name="norm")(x[:, int(part.class_token) :])
        x = widened(dense(part.image_channels * part.patch**2, "pixels", True, c.dtype)(x))
        x = unpatchify(x.reshape(len(x), h, w, -1), part.patch, part.image_channels)
        mean, std = (np.asarray(values, np.float32) for values in (part.mean, part.std))
        return 2 * std * x + (2 * mean - 1)


def require_grid(tokens: jax.Array, grid: Grid) -> Grid:
    """The grid (h, w). Raises ValueError unless the tokens (B, N, ...) are h w."""
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[1]} tokens were given; a grid of {grid[0]}x{grid[1]} has {grid[0] * grid[1]}")
    return grid


def _learned_positions(module: nn.Module, cfg: FaeConfig, grid: Grid, width: int) -> jax.Array:
    """The module's table of learned positions, resized to `grid`: (N, E) fp32."""
    table = module.param("position_embedding", nn.initializers.normal(0.02), (cfg.grid[0] * cfg.grid[1], width))
    return resize_positions(table, grid, antialias=False, learned=cfg.grid).reshape(-1, width)


def rotary_angles(learned: Grid, grid: Grid, head_dim: int) -> np.ndarray:
    """Rotary angles (N, K/2) of a grid's tokens: half of the frequencies turn with the row, half with the column.

    Rows and columns are counted in the grid `learned`, onto which `grid` is stretched.
    """
    frequencies = THETA ** (-np.arange(head_dim // 4) / (head_dim // 4))
    axes = [(np.arange(new) + 0.5) * old / new - 0.5 for old, new in zip(learned, grid, strict=True)]
    rows, columns = np.meshgrid(*axes, indexing="ij")
    angles = np.stack([rows.ravel(), columns.ravel()], -1)[..., None] * frequencies
    return angles.reshape(-1, head_dim // 2).astype(np.float32)


def sincos_positions(grid: Grid, width: int) -> np.ndarray:
    """Fixed positions (N, E) of a grid's tokens: sines, then cosines, of the column; then the same of the row.

    As in `get_2d_sincos_pos_embed` of `diffusers`: the grid is stretched to SINCOS_GRID rows and columns.
    """
    frequencies = THETA ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(*(np.arange(n) * SINCOS_GRID / n for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], -1).astype(np.float32)
