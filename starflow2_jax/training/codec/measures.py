"""What evaluations of a codec measure, as functions of arrays alone. Pictures are (B, H, W, C) in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, DEVIATION = 11, 1.5  # of SSIM's Gaussian window, in pixels
SMALL = (0.01**2, 0.03**2)  # SSIM's constants, for levels in 0..1
ACTIVE = 0.01  # variance of a latent channel's mean above which the channel counts as active (arXiv 1509.00519)
STRENGTH = 1e-3  # of the probe's ridge, beside features of variance 1


def as_levels(pictures: jax.Array) -> jax.Array:
    """Pictures as uint8 levels, as in a PNG file."""
    return jnp.clip(jnp.round((pictures + 1) * 127.5), 0, 255).astype(jnp.uint8)


def psnr(made: jax.Array, real: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio (B,) in dB of levels (B, H, W, C) uint8; two equal pictures count as one wrong
    level.
    """
    made, real = (x.astype(jnp.float32) for x in (made, real))
    error = jnp.mean((made - real) ** 2, (1, 2, 3))
    return 10 * jnp.log10(255**2 / jnp.maximum(error, 1 / made[0].size))


def ssim(made: jax.Array, real: jax.Array) -> jax.Array:
    """Structural similarity (B,) of levels (B, H, W, C) uint8: the mean over channels and whole windows.

    Wang et al., IEEE Trans. Image Processing 13, 2004, with the Gaussian window of 11 x 11 pixels.
    """
    made, real = (x.astype(jnp.float32) / 255 for x in (made, real))
    rows, columns = (_window(side) for side in made.shape[1:3])

    def blurred(x: jax.Array) -> jax.Array:
        return jnp.einsum("hi,wj,bijc->bhwc", rows, columns, x, precision="highest")

    a, b = blurred(made), blurred(real)
    variance = blurred(made**2) - a**2 + blurred(real**2) - b**2
    covariance = blurred(made * real) - a * b
    found = (2 * a * b + SMALL[0]) * (2 * covariance + SMALL[1])
    return jnp.mean(found / ((a**2 + b**2 + SMALL[0]) * (variance + SMALL[1])), (1, 2, 3))


def _window(side: int) -> np.ndarray:
    """The matrix (side - 10, side) that takes weighted means of 11 neighbours."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / DEVIATION) ** 2)
    places = np.arange(side)[None] - np.arange(side - WINDOW + 1)[:, None]
    inside = (places >= 0) & (places < WINDOW)
    return np.where(inside, (weights / weights.sum())[places.clip(0, WINDOW - 1)], 0).astype(np.float32)


def active_channels(mean: np.ndarray, square: np.ndarray) -> int:
    """The number of channels whose means vary: `mean` and mean `square` (D,) of the latents' means over many tokens."""
    return int(np.sum(square - mean**2 > ACTIVE))


def probe(features: np.ndarray, classes: np.ndarray, tested: np.ndarray, wanted: np.ndarray) -> float:
    """The share of `tested` features (m, C) whose class (m,), `wanted`, a ridge regression on `features` (n, C) finds.

    It regresses on one number for each class (n,), 1 for the right one and 0 for the others, with an intercept, in fp64
    and in closed form. Features are scaled to variance 1 over the n.
    """
    features, tested = features.astype(np.float64), tested.astype(np.float64)
    names, numbers = np.unique(classes, return_inverse=True)
    middle, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
    x, y = (features - middle) / scale, np.eye(len(names))[numbers]
    share = y.mean(0)
    weights = np.linalg.solve(x.T @ x + STRENGTH * len(x) * np.eye(x.shape[1]), x.T @ (y - share))
    found = names[np.argmax((tested - middle) / scale @ weights + share, axis=1)]
    return float(np.mean(found == wanted))
