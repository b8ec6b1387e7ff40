"""Guidance against its definition by densities, computed by brute force on a grid."""

import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.sampling.guidance import extrapolate, gaussian_mixing, linear, mix_gaussians

GRID = np.linspace(-60, 60, 600_001)


def log_density(mean, scale):
    return -0.5 * ((GRID - mean) / scale) ** 2 - np.log(scale)


def moments(log_p):
    """Mean and deviation of an unnormalised density on the grid."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * GRID).sum()
    return mean, np.sqrt((p * (GRID - mean) ** 2).sum())


def pair(mean_c, scale_c, mean_u, scale_u):
    return tuple(tuple(jnp.float32(x) for x in g) for g in ((mean_c, scale_c), (mean_u, scale_u)))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("case", [(0.4, 0.5, -1.0, 0.9), (-1.0, 0.2, 2.0, 3.0), (0.3, 1.2, 0.9, 1.2)])
def test_mixing_is_the_product_of_powers(case, weight):
    """p_c^(1+w) / p_u^w, normalised, while the conditional is no wider than the unconditional.

    Its precision is ((1 + w) - w s) / scale_c^2 with s = (scale_c / scale_u)^2: the powers' own.
    """
    mean_c, scale_c, mean_u, scale_u = case
    expected = moments((1 + weight) * log_density(mean_c, scale_c) - weight * log_density(mean_u, scale_u))
    np.testing.assert_allclose(mix_gaussians(*pair(*case), weight), expected, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_mixing_with_a_wider_conditional(weight):
    """Then s = 1, as if the unconditional were as wide: the mean is extrapolated and the scale stays."""
    mean, scale = mix_gaussians(*pair(0.7, 1.5, 0.2, 0.6), weight)
    expected = moments((1 + weight) * log_density(0.7, 1.5) - weight * log_density(0.2, 1.5))
    np.testing.assert_allclose((mean, scale), expected, rtol=1e-4)
    np.testing.assert_allclose((mean, scale), (0.7 + weight * (0.7 - 0.2), 1.5), rtol=1e-5)


def test_mixing_is_elementwise_and_always_normalisable():
    rng = np.random.default_rng(0)
    c, u = ((rng.normal(size=(3, 4)).astype(np.float32), rng.lognormal(0, 2, (3, 4)).astype(np.float32)) for _ in "cu")
    mean, scale = mix_gaussians(c, u, 50.0)
    assert mean.shape == scale.shape == (3, 4) and np.isfinite(mean).all()
    assert (scale > 0).all() and (scale <= c[1] * (1 + 1e-6)).all()
    one = mix_gaussians((c[0][1, 2], c[1][1, 2]), (u[0][1, 2], u[1][1, 2]), 50.0)
    np.testing.assert_allclose((mean[1, 2], scale[1, 2]), one, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_extrapolation_is_linear_in_mean_and_log_scale(weight):
    mean, scale = extrapolate(*pair(0.4, 0.5, -1.0, 0.9), weight)
    np.testing.assert_allclose(mean, 0.4 + weight * 1.4, rtol=1e-5)
    np.testing.assert_allclose(np.log(scale), np.log(0.5) + weight * (np.log(0.5) - np.log(0.9)), rtol=1e-5)


@pytest.mark.parametrize("guide", [gaussian_mixing(0.0), linear(0.0, 5), linear(0.0, 5, annealed=True)])
def test_no_weight_is_the_conditional(guide):
    conditional, unconditional = pair(0.4, 0.5, -1.0, 0.9)
    np.testing.assert_allclose(guide(conditional, unconditional, 2), conditional, rtol=1e-6)


def test_guides_carry_their_weight():
    """linear: w at each of the T - 1 = 4 steps; annealed: w/4, w/2, 3w/4, w. Mixing: w always."""
    c, u = pair(0.4, 0.5, -1.0, 0.9)
    for index, annealed in enumerate((0.5, 1.0, 1.5, 2.0)):
        np.testing.assert_allclose(linear(2.0, 5)(c, u, index), extrapolate(c, u, 2.0), rtol=1e-6)
        np.testing.assert_allclose(linear(2.0, 5, annealed=True)(c, u, index), extrapolate(c, u, annealed), rtol=1e-6)
        np.testing.assert_allclose(gaussian_mixing(2.0)(c, u, index), mix_gaussians(c, u, 2.0), rtol=1e-6)
