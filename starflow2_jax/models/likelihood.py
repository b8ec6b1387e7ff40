"""Exact log-likelihoods of a Sequence under an Output, element by element; losses and scores are sums of them."""

import jax
import jax.numpy as jnp

from starflow2_jax.models.flow import normalize
from starflow2_jax.models.pretzel import Output
from starflow2_jax.parallel.sharding import axis_size, constrain
from starflow2_jax.sequence import Sequence

CHUNK = 256  # positions of a row whose logits exist at once


def image_noise(output: Output, sequence: Sequence) -> tuple[jax.Array, jax.Array]:
    """The images' noise z, and the elementwise log-determinant of the map from latents to z, both (B, M, N, D) fp32.

    z_n = (u_n - mu_n) / sigma_n. The log-determinant is the sum of the deep flow's, -log sigma_n, and the shallow
    flow's. Summed over an image, log N(z; 0, 1) + logdet is exactly log p(latents | everything before the image) (arXiv
    2605.08029).
    """
    at = sequence.image_predictors()[..., None]
    mean, scale = (jnp.take_along_axis(a, at, axis=1).reshape(output.u.shape) for a in (output.mean, output.scale))
    z, logdet = normalize(output.u, mean, scale)
    return z, logdet + output.logdet


def text_nll(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """-log p(target) at each position in nats (B, S), for hidden (B, S, E), head (V, E), targets (B, S).

    Logits are made for about `chunk` positions of a row at a time, so an array (B, S, V) never exists. If the mesh
    splits positions over devices, a chunk takes the same number of positions from each part of a row. The rows of the
    head stay on their devices: no array of size V is moved.
    """
    B, S, _ = hidden.shape
    parts = axis_size("sequence") if S % axis_size("sequence") == 0 else 1
    chunk = min(-(-chunk // parts), S // parts)
    pad = -(S // parts) % chunk

    def chunks(x):
        x = x.reshape(B, parts, S // parts, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(B, parts, -1, chunk, *x.shape[3:]), 2, 0)

    head = constrain(head.astype(hidden.dtype), "words", None)

    @jax.checkpoint
    def one(part):
        h, t = part
        logits = jnp.einsum("bpse,ve->bpsv", h, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "sequence", None, "words")
        at = jnp.arange(logits.shape[-1]) == t[..., None]  # for a sum over words; an index would gather the logits
        return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(at, logits, 0), axis=-1)

    nll = jax.lax.map(one, (chunks(hidden), chunks(targets)))
    return jnp.moveaxis(nll, 0, 2).reshape(B, parts, -1)[..., : S // parts].reshape(B, S)
