"""What the flow's exactness gives of a finished image: the noise that it is made of, both ways, and its score.

Prompts are documents; an image here is an array as the codec takes it, pixels (height, width, C) in [-1, 1].
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, Image
from starflow2_jax.models.likelihood import image_noise
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import BATCH, batches, layout
from starflow2_jax.sequence import Sequence, Step


def encode(sampler: Sampler, prompts: list[Document], images: list[np.ndarray], batch_size: int = BATCH) -> np.ndarray:
    """Each image's noise under its prompt, z (B, N, D): standard normal where the image is a sample of the model's.

    One pass: u by the shallow flow, z_n = (u_n - mu_n) / sigma_n by the deep one. `decode` is the inverse.
    """
    features = [layout(sampler, _with(prompt, image), closed=False) for prompt, image in _pairs(prompts, images)]
    found = np.zeros((len(features), sampler.model.cfg.tokens, sampler.model.cfg.channels), np.float32)
    for rows, batch in batches(sampler, features, ("the noise",), batch_size):
        z = np.asarray(sampler.run(_noise, sampler.model, sampler.skips, sampler.params, batch))
        for row, i in enumerate(rows):
            found[i] = z[row, len(features[i]["latents"]) - 1]
    return found


def decode(sampler: Sampler, prompts: list[Document], z: np.ndarray, batch_size: int = BATCH) -> np.ndarray:
    """The images that noise z (B, N, D) makes under the prompts, (B, height, width, C), not clipped.

    Token by token, u_n = mu_n + sigma_n z_n, then the inverse of shallow flow and codec. With another prompt than that of
    `encode` it is another image of the same noise.
    """
    blank = np.zeros(sampler.codec.image_shape, np.float32)
    features = [layout(sampler, _with(prompt, blank), closed=False) for prompt, _ in _pairs(prompts, z)]
    u = np.zeros(z.shape, np.float32)
    for rows, batch in batches(sampler, features, ("the image of noise",), batch_size):
        given = rows + rows[-1:] * (len(batch.tokens) - len(rows))
        start = np.array([len(features[i]["tokens"]) for i in given], np.int32) - sampler.model.cfg.tokens - 2
        written = sampler.run(_write, sampler.model, sampler.skips, sampler.params, batch, start, np.asarray(z)[given])
        u[rows] = np.asarray(written)[: len(rows)]
    return sampler.decode(u)


def denoise(
    sampler: Sampler, prompts: list[Document], answers: list[Document], sigma: float, batch_size: int = BATCH
) -> list[Document]:
    """The answers, of each image x in them its mean without the noise: x - sigma^2 grad_x NLL(x | all before it).

    Tweedie's formula for a model of images with noise N(0, sigma^2) added (TarFlow, arXiv 2412.06329); NLL in nats, the
    total. sigma: in the images' own units, the config's `noise` with which the model was trained; in latents it is divided
    by the codec's deviations. The images before one stay as they were drawn, noise included, as in training.
    """
    if sigma < 0:
        raise DocumentError("sigma is a deviation, at least 0")
    features = [layout(sampler, p + a, closed=False) for p, a in _pairs(prompts, answers)]
    variance = np.square(sigma / np.asarray(sampler.codec.std, np.float32))
    cleaned = list(answers)
    for rows, batch in batches(sampler, features, ("the denoising",), batch_size):
        latents = np.asarray(sampler.run(_tweedie, sampler.model, sampler.skips, sampler.params, batch, variance))
        for row, i in enumerate(rows):
            own = latents[row, sum(map(_is_flow, prompts[i])) :].reshape(-1, *sampler.codec.grid, latents.shape[-1])
            images = iter(sampler.codec.decode(own))
            cleaned[i] = [Image(next(images), part.generate) if _is_flow(part) else part for part in answers[i]]
    return cleaned


def _pairs(prompts, others):
    if len(prompts) != len(others):
        raise DocumentError(
            f"{len(prompts)} prompts were given with {len(others)} images or answers; give one for each"
        )
    return zip(prompts, others, strict=True)


def _with(prompt: Document, image: np.ndarray) -> Document:
    return [*prompt, Image(image, generate=True)]


def _is_flow(part) -> bool:
    return isinstance(part, Image) and part.via == "flow"


@partial(jax.jit, static_argnums=(0, 1))
def _noise(model: Pretzel, skips: bool, params, batch: Sequence) -> jax.Array:
    return image_noise(model.apply({"params": params}, batch, skips=skips), batch)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _write(model: Pretzel, skips: bool, params, batch: Sequence, start: jax.Array, z: jax.Array) -> jax.Array:
    """u (B, N, D) of the image whose <|vision_start|> stands at position `start` (B,); what the row holds of it is not read.

    The row is read into the caches and rewound to `start`; the image's tokens and positions are the row's, its u the new.
    """
    B, S = batch.tokens.shape
    at = start[:, None] + jnp.arange(z.shape[1])  # the position that predicts each token
    fed = [jnp.take_along_axis(a, at, axis=1) for a in (batch.tokens, batch.modality)]
    fed.append(jnp.take_along_axis(batch.positions, at[..., None], axis=1))
    empty = model.apply({"params": params}, B, S, method=Pretzel.empty_caches)
    caches = model.apply({"params": params}, batch, empty, skips=skips).caches.rewind(start)

    def step(carry, now):
        caches, u = carry
        *position, noise = now
        feed = Step(*(a[:, None] for a in position), u[:, None])
        output = model.apply({"params": params}, feed, caches, skips=skips)
        u = output.mean[:, 0] + output.scale[:, 0] * noise
        return (output.caches, u), u

    over_tokens = [jnp.moveaxis(a, 1, 0) for a in (*fed, z)]
    _, u = jax.lax.scan(step, (caches, jnp.zeros_like(z[:, 0])), over_tokens)
    return jnp.moveaxis(u, 0, 1)


@partial(jax.jit, static_argnums=(0, 1))
def _tweedie(model: Pretzel, skips: bool, params, batch: Sequence, variance: jax.Array) -> jax.Array:
    """Latents (B, M, N, D) less variance (D,) times the gradient of each image's NLL by that image alone."""

    def nll(latents, m):
        seen = batch.replace(latents=latents)
        z, logdet = image_noise(model.apply({"params": params}, seen, skips=skips), seen)
        return jnp.sum((0.5 * z**2 - logdet)[:, m])

    images = jnp.arange(batch.latents.shape[1])
    gradient = jax.lax.map(lambda m: jax.grad(nll)(batch.latents, m)[:, m], images)
    return batch.latents - variance * jnp.moveaxis(gradient, 0, 1)
