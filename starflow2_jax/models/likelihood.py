"""What an Output says of the Sequence it read: exact log-likelihoods, element by element. Losses and scores add them up."""

import jax
import jax.numpy as jnp

from starflow2_jax.models.flow import normalize
from starflow2_jax.models.pretzel import Output
from starflow2_jax.sequence import Sequence


def image_noise(output: Output, sequence: Sequence) -> tuple[jax.Array, jax.Array]:
    """The images' noise z and the elementwise log-determinant of the map latents -> z, both (B, M, N, D) fp32.

    z_n = (u_n - mu_n) / sigma_n; the log-determinant is the deep flow's, -log sigma_n, and the shallow flow's. Summed over
    an image, log N(z; 0, 1) + logdet is log p(latents | all before the image), exact (arXiv 2605.08029).
    """
    at = sequence.image_predictors()[..., None]
    mean, scale = (jnp.take_along_axis(a, at, axis=1).reshape(output.u.shape) for a in (output.mean, output.scale))
    z, logdet = normalize(output.u, mean, scale)
    return z, logdet + output.logdet


def text_nll(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """-log p(target) at each position, nats (B, S); `chunk` positions of a row at a time, so (B, S, V) never exists.

    hidden (B, S, E), head (V, E), targets (B, S).
    """
    B, S, E = hidden.shape
    chunk = min(chunk, S)
    pad = -S % chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(part):
        h, t = part
        logits = jnp.einsum("bse,ve->bsv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]

    nll = jax.lax.map(one, (chunks(hidden), chunks(targets)))
    return jnp.moveaxis(nll, 0, 1).reshape(B, S + pad)[:, :S]
