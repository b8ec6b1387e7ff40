"""LPIPS, a perceptual distance in the features of VGG-16 (arXiv 1801.03924). A user brings the weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Convolutions and their channels between the poolings; LPIPS compares the features after each group.
GROUPS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
LEAST = 1e-24  # a squared norm, below which the gradient is 0


class Lpips(nn.Module):
    """The distance between pictures."""

    @nn.compact
    def __call__(self, made: jax.Array, real: jax.Array) -> jax.Array:
        """Pictures (B, H, W, 3) in [-1, 1], of at least 16 pixels a side -> distances (B,)."""
        x = (jnp.concatenate([made, real]) - np.asarray(SHIFT, np.float32)) / np.asarray(SCALE, np.float32)
        total = jnp.zeros(len(made))
        for i, (count, channels) in enumerate(GROUPS):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for k in range(count):
                x = jax.nn.relu(nn.Conv(channels, (3, 3), name=f"conv_{i}_{k}")(x))
            norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), LEAST))
            a, b = jnp.split(x / (norm + 1e-10), 2)
            weights = self.param(f"linear_{i}", nn.initializers.ones, (channels,))
            total = total + jnp.mean(jnp.sum(weights * (a - b) ** 2, -1), axis=(1, 2))
        return total
