"""Classifier-free guidance on Gaussians: two predictions of the next image token become one."""

import jax
import jax.numpy as jnp


def mix_gaussians(conditional: tuple, unconditional: tuple, weight) -> tuple[jax.Array, jax.Array]:
    """STARFlow's guidance (arXiv 2506.06276): p_c^(1+w) / p_u^w, with s keeping it normalisable.

    Each argument is (mean, scale); weight w >= 0 is a number or broadcasts. w = 0 gives back the conditional.
    """
    (mean_c, scale_c), (mean_u, scale_u) = conditional, unconditional
    s = jnp.square(jnp.minimum(scale_c / scale_u, 1.0))
    k = 1 + weight - weight * s
    return ((1 + weight) * mean_c - weight * s * mean_u) / k, scale_c / jnp.sqrt(k)


def extrapolate(conditional: tuple, unconditional: tuple, weight) -> tuple[jax.Array, jax.Array]:
    """TarFlow's guidance (arXiv 2412.06329): mean and log-scale each extrapolated, c + w (c - u)."""
    (mean_c, scale_c), (mean_u, scale_u) = conditional, unconditional
    return mean_c + weight * (mean_c - mean_u), scale_c * (scale_c / scale_u) ** weight


def linear(weight: float, tokens: int, annealed: bool = False):
    """TarFlow's guidance as a flow's `guide`; annealed: w (i + 1) / (tokens - 1) at the i-th of its tokens - 1 steps."""

    def guide(conditional, unconditional, index):
        return extrapolate(conditional, unconditional, weight * (index + 1) / (tokens - 1) if annealed else weight)

    return guide


def gaussian_mixing(weight: float):
    """STARFlow's guidance as a flow's `guide`."""
    return lambda conditional, unconditional, _: mix_gaussians(conditional, unconditional, weight)
