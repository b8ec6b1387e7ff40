"""Finished images <-> the noise that the exact flow maps them to, and denoising by the score of the flow's density.

Prompts are documents. An image here is an array in the form that the codec takes, such as pixels (height, width, C) in
[-1, 1].
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.models.likelihood import image_noise
from starflow2_jax.models.pretzel import Pretzel, apply
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import BATCH, batches, layout
from starflow2_jax.sequence import Sequence, Step

Other = TypeVar("Other")


def encode(sampler: Sampler, prompts: list[Document], images: list[np.ndarray], batch_size: int = BATCH) -> np.ndarray:
    """The noise z (B, N, D) of each image under its prompt: standard normal if the model drew the image.

    One pass: the shallow flow gives u, the deep flow z_n = (u_n - mu_n) / sigma_n. `decode` is the inverse. Raises
    DocumentError.
    """
    features = [layout(sampler, _with(prompt, image), closed=False) for prompt, image in _pairs(prompts, images)]
    found = np.zeros((len(features), sampler.model.cfg.tokens, sampler.model.cfg.channels), np.float32)
    for rows, batch in batches(sampler, features, ("the noise",), batch_size):
        z = np.asarray(sampler.run(_noise, sampler.model, sampler.skips, sampler.params, batch))
        for row, i in enumerate(rows):
            found[i] = z[row, len(features[i]["latents"]) - 1]
    return found


def decode(sampler: Sampler, prompts: list[Document], z: np.ndarray, batch_size: int = BATCH) -> np.ndarray:
    """The images (B, height, width, C) that noise z (B, N, D) makes under the prompts, not clipped.

    Token by token, u_n = mu_n + sigma_n z_n; then the shallow flow and the codec are inverted. With another prompt than
    the one given to `encode`, the same noise makes another image. Raises DocumentError.
    """
    blank = Image(np.zeros((*sampler.codec.grid, sampler.codec.channels), np.float32), generate=True, encoded=True)
    features = [layout(sampler, [*prompt, blank], closed=False) for prompt, _ in _pairs(prompts, z)]
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
    """The answers with each image x replaced by its mean without the noise, x - sigma^2 grad_x NLL(x | all before it).

    This is Tweedie's formula for a model of images with added noise N(0, sigma^2) (TarFlow, arXiv 2412.06329); NLL is
    the image's total in nats. sigma: the config's `noise`, in the images' units; it is divided by the codec's
    deviations for latents. While one image is denoised, the images before it keep their noise, as in training. Raises
    DocumentError.
    """
    if sigma < 0:
        raise DocumentError(f"sigma is a standard deviation and must be at least 0, not {sigma!r}")
    features = [layout(sampler, p + a, closed=False) for p, a in _pairs(prompts, answers)]
    variance = np.square(sigma / np.asarray(sampler.codec.std, np.float32))
    cleaned = list(answers)
    for rows, batch in batches(sampler, features, ("the denoising",), batch_size):
        latents = np.asarray(sampler.run(_tweedie, sampler.model, sampler.skips, sampler.params, batch, variance))
        for row, i in enumerate(rows):
            own = latents[row, sum(map(_is_flow, prompts[i])) :].reshape(-1, *sampler.codec.grid, latents.shape[-1])
            images = iter(np.asarray(sampler.run(sampler.codec.decode, own)))
            cleaned[i] = [Image(next(images), part.generate) if _is_flow(part) else part for part in answers[i]]
    return cleaned


def _pairs(prompts: list[Document], others: Collection[Other]) -> Iterator[tuple[Document, Other]]:
    """Each prompt with its image or answer. Raises DocumentError if the numbers differ."""
    if len(prompts) != len(others):
        raise DocumentError(
            f"{len(prompts)} prompts were given with {len(others)} images or answers; give one for each"
        )
    return zip(prompts, others, strict=True)


def _with(prompt: Document, image: np.ndarray) -> Document:
    """The prompt followed by the image."""
    return [*prompt, Image(image, generate=True)]


def _is_flow(part: Text | Image) -> TypeGuard[Image]:
    """Whether a part is an image of flow tokens."""
    return isinstance(part, Image) and part.via == "flow"


@partial(jax.jit, static_argnums=(0, 1))
def _noise(model: Pretzel, skips: bool, params: dict, batch: Sequence) -> jax.Array:
    """z (B, M, N, D) of all images of a batch."""
    return image_noise(apply(model, params, batch, skips=skips), batch)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _write(model: Pretzel, skips: bool, params: dict, batch: Sequence, start: jax.Array, z: jax.Array) -> jax.Array:
    """u (B, N, D) of the image whose <|vision_start|> is at position `start` (B,), made from its noise z (B, N, D).

    The whole row is read into the caches, which are then rewound to `start`. The image's token ids and positions come
    from the row, its u from z; the u that the row holds there is ignored.
    """
    B, S = batch.tokens.shape
    at = start[:, None] + jnp.arange(z.shape[1])  # the position that predicts each token
    fed = [jnp.take_along_axis(a, at, axis=1) for a in (batch.tokens, batch.modality)]
    fed.append(jnp.take_along_axis(batch.positions, at[..., None], axis=1))
    empty = apply(model, params, B, S, method=Pretzel.empty_caches)
    caches = apply(model, params, batch, empty, skips=skips).caches.rewind(start)

    def step(carry, now):
        caches, u = carry
        token, modality, position, noise = now
        feed = Step(token[:, None], modality[:, None], position[:, None], u[:, None])
        output = apply(model, params, feed, caches, skips=skips)
        u = output.mean[:, 0] + output.scale[:, 0] * noise
        return (output.caches, u), u

    over_tokens = [jnp.moveaxis(a, 1, 0) for a in (*fed, z)]
    _, u = jax.lax.scan(step, (caches, jnp.zeros_like(z[:, 0])), over_tokens)
    return jnp.moveaxis(u, 0, 1)


@partial(jax.jit, static_argnums=(0, 1))
def _tweedie(model: Pretzel, skips: bool, params: dict, batch: Sequence, variance: jax.Array) -> jax.Array:
    """Latents (B, M, N, D) minus variance (D,) times the gradient of each image's NLL with respect to that image."""

    def nll(latents, m):
        seen = batch.replace(latents=latents)
        z, logdet = image_noise(apply(model, params, seen, skips=skips), seen)
        return jnp.sum((0.5 * z**2 - logdet)[:, m])

    images = jnp.arange(batch.latents.shape[1])
    gradient = jax.lax.map(lambda m: jax.grad(nll)(batch.latents, m)[:, m], images)
    return batch.latents - variance * jnp.moveaxis(gradient, 0, 1)
