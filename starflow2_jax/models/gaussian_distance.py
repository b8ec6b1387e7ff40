"""The Fréchet distance between two Gaussians, by which sets of pictures are compared in a network's features."""

import numpy as np


def frechet(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """|mean difference|^2 + trace(A + B - 2 (A B)^(1/2)) of means (D,) and covariances A and B (D, D), in fp64."""
    roots = np.real(np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).astype(complex)))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum())


def frechet_of(a: np.ndarray, b: np.ndarray) -> float:
    """The same of the Gaussians that have the means and covariances of two sets of features (n, D), at least two
    each.

    With X and Y the centred features, each divided by the root of n - 1, the eigenvalues of A B are the squared
    singular values of X Y^T, which is smaller than A and B where there are fewer features than channels.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (a, b))
    if max(len(x), len(y)) > x.shape[1]:
        return frechet(a.mean(0), x.T @ x, b.mean(0), y.T @ y)
    roots = np.linalg.svd(x @ y.T, compute_uv=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * roots.sum())
