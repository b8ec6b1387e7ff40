"""The two losses, as sums over what counts and the counts, so that any split of a batch adds up to the same."""

import jax
import jax.numpy as jnp

from starflow2_jax.models.flow import normalize
from starflow2_jax.models.pretzel import Output
from starflow2_jax.sequence import Sequence


def image_nll(output: Output, sequence: Sequence) -> jax.Array:
    """Negative log-likelihood of each image (B, M), in nats summed over its N * D dimensions, without the 0.5 ln 2 pi.

    Exact: the deep flow's Gaussians of u and the shallow flow's log-determinant (arXiv 2605.08029; flow.md's loss).
    """
    at = sequence.image_predictors()[..., None]
    shape = output.u.shape
    mean, scale = (jnp.take_along_axis(a, at, axis=1).reshape(shape) for a in (output.mean, output.scale))
    z, logdet = normalize(output.u, mean, scale)
    return jnp.sum(0.5 * z**2 - logdet - output.logdet, axis=(2, 3))


def text_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Weighted sum of cross-entropies in nats; `chunk` positions of a row at a time, so (B, S, V) never exists.

    hidden (B, S, E), head (V, E), targets and weights (B, S).
    """
    B, S, E = hidden.shape
    chunk = min(chunk, S)
    pad = -S % chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total, part):
        h, t, w = part
        logits = jnp.einsum("bse,ve->bsv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return total + jnp.sum(w * (jax.nn.logsumexp(logits, axis=-1) - target)), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (chunks(hidden), chunks(targets), chunks(weights)))
    return total


def counts(sequence: Sequence) -> dict[str, jax.Array]:
    """What the sums are divided by: latent dimensions and text tokens that count as predictions."""
    _, _, N, D = sequence.latents.shape
    _, weights = sequence.text_targets()
    return {"image": jnp.sum(sequence.image_weight) * N * D, "text": jnp.sum(weights)}
