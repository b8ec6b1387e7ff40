"""Classifier-free guidance on Gaussians: combines two predictions of the next image token into one."""

import jax
import jax.numpy as jnp

from starflow2_jax.models.flow import Guide

Gaussian = tuple[jax.Array, jax.Array]  # mean and scale


def mix_gaussians(conditional: Gaussian, unconditional: Gaussian, weight: float | jax.Array) -> Gaussian:
    """STARFlow's guidance (arXiv 2506.06276): p_c^(1+w) / p_u^w.

    The ratio s of the variances, conditional to unconditional, is limited to 1, so that the result can be normalised.
    The weight w >= 0 is a number or an array that broadcasts; w = 0 returns the conditional Gaussian.
    """
    (mean_c, scale_c), (mean_u, scale_u) = conditional, unconditional
    s = jnp.square(jnp.minimum(scale_c / scale_u, 1.0))
    k = 1 + weight - weight * s
    return ((1 + weight) * mean_c - weight * s * mean_u) / k, scale_c / jnp.sqrt(k)


def extrapolate(conditional: Gaussian, unconditional: Gaussian, weight: float | jax.Array) -> Gaussian:
    """TarFlow's guidance (arXiv 2412.06329): extrapolates the mean and the log-scale, c + w (c - u) each."""
    (mean_c, scale_c), (mean_u, scale_u) = conditional, unconditional
    return mean_c + weight * (mean_c - mean_u), scale_c * (scale_c / scale_u) ** weight


def linear(weight: float, tokens: int, annealed: bool = False) -> Guide:
    """TarFlow's guidance as a flow's `guide`. If annealed, the weight is w (i + 1) / (tokens - 1) at index i."""

    def guide(conditional: Gaussian, unconditional: Gaussian, index: jax.Array) -> Gaussian:
        return extrapolate(conditional, unconditional, weight * (index + 1) / (tokens - 1) if annealed else weight)

    return guide


def gaussian_mixing(weight: float) -> Guide:
    """STARFlow's guidance as a flow's `guide`."""
    return lambda conditional, unconditional, _: mix_gaussians(conditional, unconditional, weight)
