"""What evaluations of a codec measure, against other implementations."""

import jax
import numpy as np
import pytest
import scipy.linalg

from starflow2_jax.models.gaussian_distance import frechet, frechet_of
from starflow2_jax.training.codec import measures


def levels(count: int = 3, side: int = 24, seed: int = 0) -> np.ndarray:
    """Blurred random pictures, so that SSIM's windows have structure."""
    x = np.random.default_rng(seed).uniform(0, 255, (count, side, side + 4, 3))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 3
    return x.astype(np.uint8)


def noisy(x: np.ndarray, deviation: float) -> np.ndarray:
    return (x + deviation * np.random.default_rng(1).standard_normal(x.shape)).clip(0, 255).astype(np.uint8)


def test_psnr_by_hand():
    real = np.zeros((2, 2, 2, 3), np.uint8)
    made = real.copy()
    made[0, 0, 0, 0], made[1] = 12, 5  # mean squared errors 12 and 25
    np.testing.assert_allclose(measures.psnr(made, real), 20 * np.log10(255 / np.sqrt([12, 25])), rtol=1e-6)
    assert measures.psnr(real, real)[0] == pytest.approx(10 * np.log10(255**2 * 12), rel=1e-5)


@pytest.mark.parametrize("deviation", (0.0, 10.0, 60.0))
def test_ssim_is_the_published_definition(deviation):
    """Window by window in float64, with the weighted variances and covariance written out."""
    real = levels()
    made = noisy(real, deviation)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(x / 255, (11, 11), (1, 2)) for x in (made, real))
    means = [np.sum(window * x, (-1, -2), keepdims=True) for x in (a, b)]
    deviations = [x - mean for x, mean in zip((a, b), means, strict=True)]
    va, vb = (np.sum(window * x**2, (-1, -2)) for x in deviations)
    both = np.sum(window * deviations[0] * deviations[1], (-1, -2))
    ma, mb = (mean[..., 0, 0] for mean in means)
    c1, c2 = 0.01**2, 0.03**2
    wanted = ((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean((1, 2, 3))
    np.testing.assert_allclose(jax.jit(measures.ssim)(made, real), wanted, atol=2e-5)
    assert (wanted == 1).all() if not deviation else (wanted < 0.98).all()


def test_the_frechet_distance_is_that_of_scipys_root():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 5)), rng.standard_normal((150, 5)) @ rng.standard_normal((5, 5)) + 0.3
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_of(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_of(a, a) == pytest.approx(0, abs=1e-9)
    few = rng.standard_normal((4, 8))  # singular covariances
    assert frechet_of(few, few) == pytest.approx(0, abs=1e-6)
    more = rng.standard_normal((6, 8)) + 0.5
    covariances = [np.cov(x, rowvar=False) for x in (few, more)]
    assert frechet_of(few, more) == pytest.approx(
        frechet(few.mean(0), covariances[0], more.mean(0), covariances[1]), rel=1e-5
    )
    assert frechet_of(a[:, :1], b[:, :1]) == pytest.approx(
        (a[:, 0].mean() - b[:, 0].mean()) ** 2 + (a[:, 0].std(ddof=1) - b[:, 0].std(ddof=1)) ** 2
    )


def test_channels_that_do_not_vary_are_not_active():
    x = np.random.default_rng(0).standard_normal((5000, 4)) * [1, 0.2, 0.05, 0] + [0, 3, -2, 1]
    assert measures.active_channels(x.mean(0), (x**2).mean(0)) == 2


def test_the_probe_is_a_ridge_regression():
    """The same as least squares on the features with rows of the ridge below them."""
    rng = np.random.default_rng(0)
    centres, labels = rng.standard_normal((4, 6)), rng.integers(0, 4, 120)
    x = centres[labels] + 0.9 * rng.standard_normal((120, 6)) + 5
    names = np.array([7, 11, 13, 17])[labels]
    scaled = (x[:80] - x[:80].mean(0)) / x[:80].std(0)
    targets = np.stack([names[:80] == each for each in (7, 11, 13, 17)], 1).astype(float)
    ridge = np.sqrt(measures.STRENGTH * 80) * np.eye(6)
    weights = np.linalg.lstsq(
        np.concatenate([scaled, ridge]), np.concatenate([targets - targets.mean(0), np.zeros((6, 4))]), rcond=None
    )[0]
    scores = (x[80:] - x[:80].mean(0)) / x[:80].std(0) @ weights + targets.mean(0)
    wanted = np.mean(np.array([7, 11, 13, 17])[scores.argmax(1)] == names[80:])
    assert 0.5 < wanted < 1
    assert measures.probe(x[:80], names[:80], x[80:], names[80:]) == pytest.approx(wanted)
    assert measures.probe(x[:80], names[:80], x[80:], rng.permutation(names[80:])) < 0.5
