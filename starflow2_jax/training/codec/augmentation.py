"""Differentiable augmentation of what a discriminator sees (arXiv 2006.10738)."""

import jax
import jax.numpy as jnp

SHIFT = 0.125  # of a side, at most


def augmented(key: jax.Array, pictures: jax.Array) -> jax.Array:
    """Pictures (B, H, W, C) with another brightness, saturation and contrast, moved by up to SHIFT of their sides.

    Each picture has draws of its own. What moves in from outside is 0.
    """
    colour, rows, columns = jax.random.split(key, 3)
    count, height, width, _ = pictures.shape
    brightness, saturation, contrast = jax.random.uniform(colour, (3, count, 1, 1, 1))
    x = pictures + brightness - 0.5
    x = recoloured(x, 2 * saturation, axes=(3,))
    x = recoloured(x, contrast + 0.5, axes=(1, 2, 3))
    return moved(x, shifts(rows, count, height), shifts(columns, count, width))


def recoloured(x: jax.Array, factor: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x with its distance from the mean over `axes` multiplied by `factor`."""
    mean = jnp.mean(x, axes, keepdims=True)
    return mean + factor * (x - mean)


def shifts(key: jax.Array, count: int, side: int) -> jax.Array:
    """Whole numbers (count,) of pixels, up to SHIFT of a side either way."""
    most = int(side * SHIFT + 0.5)
    return jax.random.randint(key, (count,), -most, most + 1)


def moved(x: jax.Array, down: jax.Array, right: jax.Array) -> jax.Array:
    """Pictures (B, H, W, C), each moved by its own numbers (B,) of pixels. Matrices move them, which rows can be cut
    over.
    """

    def matrix(side: int, by: jax.Array) -> jax.Array:
        places = jnp.arange(side)
        return (places[:, None] - by[:, None, None] == places).astype(x.dtype)

    rows, columns = matrix(x.shape[1], down), matrix(x.shape[2], right)
    return jnp.einsum("bhi,bwj,bijc->bhwc", rows, columns, x, precision="highest")
