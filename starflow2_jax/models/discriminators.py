"""Discriminators of pictures: one on their pixels, one on the features of a frozen encoder."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

GROUPS = 32  # of the group norms, at most
ITERATIONS = 8  # of the power method that finds a matrix's largest singular value


def _leaky(x: jax.Array, slope: float) -> jax.Array:
    return jax.nn.leaky_relu(x, slope)


class PatchDiscriminator(nn.Module):
    """A convolutional network with a logit for each patch, in the manner of TiTok's: each stage halves the sides.

    Ours: the mean of 2 x 2 pixels in place of a blur, and no pooling to a fixed number of logits.
    """

    channels: int = 128  # of the first stage; each later one doubles them
    stages: int = 3

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Pictures (B, H, W, C) in [-1, 1] -> logits (B, H / 2^stages, W / 2^stages)."""
        x = _leaky(nn.Conv(self.channels, (5, 5), name="first")(pictures), 0.1)
        for i in range(self.stages):
            channels = self.channels * 2**i
            x = nn.Conv(channels, (3, 3), name=f"conv_{i}")(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = _leaky(nn.GroupNorm(min(GROUPS, channels), epsilon=1e-5, name=f"norm_{i}")(x), 0.1)
        x = _leaky(nn.Conv(x.shape[-1], (1, 1), name="mix")(x), 0.1)
        return nn.Conv(1, (5, 5), name="logits")(x)[..., 0]


class SpectralConv(nn.Module):
    """A circular convolution over tokens whose kernel, as a matrix, is divided by its largest singular value.

    The power method begins anew each time, so that there is no state to carry along.
    """

    features: int
    width: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, N, C) -> (B, N, features)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel / largest_singular_value(kernel.reshape(-1, self.features))
        half = self.width // 2
        if half:
            x = jnp.concatenate([x[:, -half:], x, x[:, :half]], axis=1)
        y = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return y + bias


def largest_singular_value(matrix: jax.Array) -> jax.Array:
    """An estimate () from below, by ITERATIONS of the power method. Its gradient holds the singular vectors fixed."""
    fixed = jax.lax.stop_gradient(matrix)
    v = jnp.ones(matrix.shape[1]) / matrix.shape[1] ** 0.5
    for _ in range(ITERATIONS):
        v = fixed.T @ (fixed @ v)
        v = v / (jnp.linalg.norm(v) + 1e-12)
    u = fixed @ v
    return (u / (jnp.linalg.norm(u) + 1e-12)) @ (matrix @ v)


class FeatureHead(nn.Module):
    """One head of FeatureDiscriminator."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features (B, N, C) -> logits (B, N)."""
        C = x.shape[-1]

        def block(x: jax.Array, width: int, name: str) -> jax.Array:
            x = SpectralConv(C, width, name=f"{name}_conv")(x)
            return _leaky(nn.GroupNorm(min(GROUPS, C), epsilon=1e-5, name=f"{name}_norm")(x), 0.2)

        x = block(x, 1, "in")
        x = (x + block(x, self.width, "mid")) / 2**0.5
        return SpectralConv(1, name="out")(x)[..., 0]


class FeatureDiscriminator(nn.Module):
    """A head for each of several layers of a frozen encoder (StyleGAN-T, arXiv 2301.09515; RAE's recipe).

    Ours: group norms, which do not mix the pictures of a batch, in place of batch norms.
    """

    width: int = 9  # tokens that a head's wide convolution sees

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> jax.Array:
        """Features (B, N, C) of each layer -> logits (B, layers N)."""
        heads = [FeatureHead(self.width, name=f"head_{i}")(x) for i, x in enumerate(features)]
        return jnp.concatenate(heads, axis=1)
