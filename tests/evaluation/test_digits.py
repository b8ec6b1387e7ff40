"""The report's numbers of samplers whose answers are known."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.data import digits
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.evaluation.digits import correlation, evaluate, held_out_nll
from starflow2_jax.models.codec import PatchCodec
from starflow2_jax.models.pretzel import Output

LIMIT = 20
CODEC = PatchCodec.fit(digits.split("train")[0], 2)


class Gaussian:
    """A model that takes every pixel for a draw of N(mean, deviation), whatever else it is shown."""

    def __init__(self, mean: float, deviation: float):
        codec_mean, codec_std = np.array(CODEC.mean), np.array(CODEC.std)
        self.mean, self.scale = (mean - codec_mean) / codec_std, deviation / codec_std

    def apply(self, _, sequence, skips) -> Output:
        at = (*sequence.tokens.shape, CODEC.channels)
        mean, scale = (jnp.broadcast_to(x.astype(np.float32), at) for x in (self.mean, self.scale))
        u = jnp.asarray(sequence.latents)
        return Output(jnp.zeros(at), mean, scale, None, u, jnp.zeros_like(u))


def sampler(answer, model=None) -> SimpleNamespace:
    """What the evaluation needs of a Sampler; `answer`: number of a prompt -> document."""
    return SimpleNamespace(
        encoder=Encoder(tiny.tokenizer(), CODEC), codec=CODEC, model=model or Gaussian(0, 1), skips=True, params={},
        generate=lambda prompts, options, seed: [answer(i) for i in range(len(prompts))],
    )  # fmt: skip


def test_who_writes_no_image_has_none_right():
    numbers, samples = evaluate(sampler(lambda i: [Text("one", predict=True)]), LIMIT)
    assert numbers["digit_accuracy"] == numbers["mirror_correlation"] == numbers["count_accuracy"] == 0
    assert numbers["sum_image_accuracy"] == 0 and np.isfinite(numbers["nll_nats_per_dim"])
    assert samples["grid"].shape == (10, 2, 8, 8, 1) and (samples["grid"] == -1).all()


def test_images_are_judged_one_by_one():
    """Two are asked for of each digit: the first of them right, the second missing where the digit is odd, else a nine."""
    pixels, labels = digits.split("train")
    scan = {digit: pixels[np.flatnonzero(labels == digit)[0]] for digit in range(10)}

    def answer(i: int) -> list:
        digit, second = divmod(i, 2)
        if second and digit % 2:
            return []
        return [Image(scan[9 if second else digit], generate=True)]

    numbers, samples = evaluate(sampler(answer), LIMIT)
    assert numbers["digit_accuracy"] == 0.5
    assert np.array_equal(samples["grid"][3, 0], scan[3]) and (samples["grid"][3, 1] == -1).all()


def test_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8, 8, 1))
    assert correlation([a, b], 3 * a + 1) == pytest.approx(1) and correlation([a], -a) == pytest.approx(-1)
    assert abs(correlation([a], b)) < 0.5 and correlation([], b) == correlation([np.ones_like(a)], b) == 0


@pytest.mark.parametrize("mean, deviation", ((0.0, 1.0), (-0.4, 0.8)))
def test_the_nll_of_a_gaussian(mean, deviation):
    """In pixels, whatever the codec makes of them: 0.5 E[((x + noise - mean) / deviation)^2] + log deviation."""
    scans = digits.split("held_out")[0].astype(np.float64)
    expected = 0.5 * (((scans - mean) ** 2).mean() + 0.1**2) / deviation**2 + np.log(deviation)
    found = held_out_nll(sampler(None, Gaussian(mean, deviation)))
    assert found == pytest.approx(expected, abs=1e-3)  # of ten draws of the noise
    more = held_out_nll(sampler(None, Gaussian(mean, deviation)), noise=0.5)
    assert more - found == pytest.approx(0.5 * (0.5**2 - 0.1**2) / deviation**2, abs=5e-3)
