"""The losses as sums over a batch, and the counts that divide them. Sums of parts of a batch add up to those of the
whole.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from starflow2_jax.models.likelihood import image_noise, text_nll
from starflow2_jax.models.pretzel import Output
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage


def image_nll(output: Output, sequence: Sequence) -> jax.Array:
    """Negative log-likelihood of each image (B, M): nats, summed over its N * D dimensions, without 0.5 ln 2 pi for
    each.
    """
    z, logdet = image_noise(output, sequence)
    return jnp.sum(0.5 * z**2 - logdet, axis=(2, 3))


def latent_squares(output: Output) -> jax.Array:
    """Squares of each image's intermediate latents (B, M), summed over its dimensions and the blocks of the shallow
    flow.
    """
    return reduce(jnp.add, (jnp.sum(h**2, axis=(2, 3)) for h in output.states))


def text_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Weighted sum of cross-entropies in nats; hidden (B, S, E), head (V, E), targets and weights (B, S)."""
    return jnp.sum(weights * text_nll(hidden, head, targets, chunk))


def counts(sequence: Sequence) -> dict[str, jax.Array]:
    """The counts () of a batch by the name of the loss: latent dimensions or text tokens that are predicted."""
    _, _, N, D = sequence.latents.shape
    _, weights = sequence.text_targets()
    dimensions = jnp.sum(sequence.image_weight) * N * D
    return {"image": dimensions, "penalty": dimensions, "text": jnp.sum(weights)}


def targets(sequence: Sequence, stage: Stage) -> jax.Array:
    """Number () of latent dimensions and text tokens in the stage's losses; 0: the stage learns nothing from the
    batch.
    """
    found = counts(sequence)
    return stage.image_loss * found["image"] + stage.text_loss * found["text"]
