"""The Fréchet distance between two Gaussians, by which sets of pictures are compared in a network's features."""

import numpy as np


def frechet(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """|mean difference|^2 + trace(A + B - 2 (A B)^(1/2)) of means (D,) and covariances A and B (D, D), in fp64."""
    roots = np.real(np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).astype(complex)))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum())


def frechet_of(a: np.ndarray, b: np.ndarray) -> float:
    """The same of the Gaussians that have the means and covariances of two sets of features (n, D), at least two
    each.
    """
    return frechet(*(f for x in map(np.float64, (a, b)) for f in (x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))))
