"""The losses as sums, and the counts that they are divided by, so that any split of a batch adds up to the same."""

from functools import reduce

import jax
import jax.numpy as jnp

from starflow2_jax.models.likelihood import image_noise, text_nll
from starflow2_jax.models.pretzel import Output
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage


def image_nll(output: Output, sequence: Sequence) -> jax.Array:
    """Negative log-likelihood of each image (B, M), in nats summed over its N * D dimensions, without the 0.5 ln 2 pi."""
    z, logdet = image_noise(output, sequence)
    return jnp.sum(0.5 * z**2 - logdet, axis=(2, 3))


def latent_squares(output: Output) -> jax.Array:
    """Squares of each image's intermediate latents (B, M), summed over its dimensions and the blocks of the shallow flow."""
    return reduce(jnp.add, (jnp.sum(h**2, axis=(2, 3)) for h in output.states))


def text_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Weighted sum of cross-entropies in nats; hidden (B, S, E), head (V, E), targets and weights (B, S)."""
    return jnp.sum(weights * text_nll(hidden, head, targets, chunk))


def counts(sequence: Sequence) -> dict[str, jax.Array]:
    """The numbers that a step's sums are divided by: latent dimensions and text tokens that count as predictions."""
    _, _, N, D = sequence.latents.shape
    _, weights = sequence.text_targets()
    dimensions = jnp.sum(sequence.image_weight) * N * D
    return {"image": dimensions, "penalty": dimensions, "text": jnp.sum(weights)}


def targets(sequence: Sequence, stage: Stage) -> jax.Array:
    """(): latent dimensions and text tokens that the stage's losses are computed from; 0: the batch teaches nothing."""
    found = counts(sequence)
    return stage.image_loss * found["image"] + stage.text_loss * found["text"]
