"""The losses of a codec's training, as functions of arrays alone. Pictures are (B, H, W, C) in [-1, 1]."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

LARGEST_WEIGHT = 1e4  # of the adversarial loss
SMALL = 1e-6  # added to the norm that the adaptive weight divides by


def l1(made: jax.Array, real: jax.Array) -> jax.Array:
    """Mean absolute error ()."""
    return jnp.mean(jnp.abs(made - real))


def l2(made: jax.Array, real: jax.Array) -> jax.Array:
    """Mean squared error ()."""
    return jnp.mean((made - real) ** 2)


def kl(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Divergence of diagonal Gaussians (..., D) from the standard normal: nats (..., D), to be summed over channels."""
    return 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance)


def feature_distance(made: Sequence[jax.Array], real: Sequence[jax.Array]) -> jax.Array:
    """Squared distance () of features (B, N, E), each scaled to norm 1: the mean over tokens and layers."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)

    each = [jnp.mean(jnp.sum((unit(a) - unit(b)) ** 2, -1)) for a, b in zip(made, real, strict=True)]
    return jnp.mean(jnp.stack(each))


def hinge(real: jax.Array, made: jax.Array) -> jax.Array:
    """The discriminator's hinge loss (), from its logits of real and of made pictures."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + made)))


def generator(made: jax.Array) -> jax.Array:
    """The generator's loss (): minus the mean of the discriminator's logits of made pictures."""
    return -jnp.mean(made)


def lecam(real: jax.Array, made: jax.Array, real_average: jax.Array, made_average: jax.Array) -> jax.Array:
    """LeCam's regulariser () of a discriminator (arXiv 2104.03310).

    real, made: mean logits () of real and of made pictures. The other two are their moving averages ().
    """
    return jax.nn.relu(real - made_average) ** 2 + jax.nn.relu(real_average - made) ** 2


def adaptive_weight(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """The factor () of the generator's loss that balances it (arXiv 2012.09841).

    Both arguments are gradients with respect to the last layer's kernel: of the reconstruction loss and of the
    generator's.
    """
    weight = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + SMALL)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, LARGEST_WEIGHT))
