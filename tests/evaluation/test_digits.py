"""The benchmark's numbers for samplers whose answers are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data import digits
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.evaluation import digits as evaluation
from starflow2_jax.evaluation.digits import DigitsBenchmark, correlation, held_out_nll
from starflow2_jax.evaluation.protocol import Answer, numbers
from starflow2_jax.models.pretzel import Output
from starflow2_jax.parallel.sharding import make_mesh

LIMIT = 20
CODEC = PatchCodec.fit(digits.split("train")[0], 2)


class Gaussian:
    """A model for which every pixel is a draw of N(mean, deviation^2), in any context."""

    cfg = SimpleNamespace(channels=CODEC.channels)

    def __init__(self, mean: float, deviation: float):
        codec_mean, codec_std = np.array(CODEC.mean), np.array(CODEC.std)
        self.mean, self.scale = (mean - codec_mean) / codec_std, deviation / codec_std

    def apply(self, _, sequence, skips) -> Output:
        at = (*sequence.tokens.shape, CODEC.channels)
        mean, scale = (jnp.broadcast_to(x.astype(np.float32), at) for x in (self.mean, self.scale))
        u = jnp.asarray(sequence.latents)
        return Output(jnp.zeros(at), mean, scale, None, u, jnp.zeros_like(u))


def sampler(model: Gaussian) -> SimpleNamespace:
    """The parts of a Sampler that scoring uses."""
    return SimpleNamespace(
        encoder=Encoder(tiny.tokenizer(), CODEC),
        codec=CODEC,
        model=model,
        skips=True,
        params={},
        max_positions=256,
        mesh=make_mesh(devices=jax.devices()[:1]),
        uses=lambda *a: None,
        run=lambda compiled, *a: compiled(*a),
    )


def evaluate(answer):
    """Numbers and page of a model that answers a task with `answer(task, its number)`."""
    benchmark = DigitsBenchmark(limit=LIMIT)
    answers = [Answer(task, 0, answer(task, int(task.key.split("/")[1]))) for task in benchmark.tasks()]
    return numbers(benchmark.score(answers, sampler(Gaussian(0, 1)))), benchmark.page(answers)


def test_who_writes_no_image_has_none_right():
    numbers, page = evaluate(lambda task, i: [Text("one", predict=True)])
    assert numbers["digit_accuracy"] == numbers["mirror_correlation"] == numbers["count_accuracy"] == 0
    assert numbers["sum_image_accuracy"] == 0 and np.isfinite(numbers["nll_nats_per_dim"])
    assert page.grid.shape == (10, 2, 8, 8, 1) and (page.grid == -1).all()


def test_images_are_judged_one_by_one():
    """Two images for each digit: the first is right; the second is missing if the digit is odd, else it shows a
    nine.
    """
    pixels, labels = digits.split("train")
    scan = {digit: pixels[np.flatnonzero(labels == digit)[0]] for digit in range(10)}

    def answer(task, i: int) -> list:
        digit, second = divmod(i, 2)
        if not task.key.startswith("write") or (second and digit % 2):
            return []
        return [Image(scan[9 if second else digit], generate=True)]

    numbers, page = evaluate(answer)
    assert numbers["digit_accuracy"] == 0.5
    assert np.array_equal(page.grid[3, 0], scan[3]) and (page.grid[3, 1] == -1).all()


def oracle(spoil=lambda kind, i: False):
    """Answers right from the prompts alone; `spoil`: which answers of a kind are wrong somewhere."""
    held_out, labels = digits.split("held_out")
    label = {scan.tobytes(): int(digit) for scan, digit in zip(held_out, labels, strict=True)}
    train, digit_of = digits.split("train")
    scan = [train[np.flatnonzero(digit_of == digit)[0]] for digit in range(10)]

    def words(*numbers) -> Text:
        return Text(" " + " ".join(digits.WORDS[n] if isinstance(n, int) else n for n in numbers), predict=True)

    def drawn(digit: int) -> Image:
        return Image(scan[digit % 10], generate=True)

    def answer(task, i: int) -> list:
        prompt, options = task.prompt, task.options
        seen = [part.pixels for part in prompt if isinstance(part, Image)]
        said = " ".join(part.text for part in prompt if isinstance(part, Text)).replace("?", " ").split()
        asked = [digits.WORDS.index(word) for word in said if word in digits.WORDS]
        if options is evaluation.MIRROR:
            return [Image(seen[0] if spoil("mirror", i) else np.flip(seen[0], 1), generate=True)]
        if len(seen) == 2:
            a, b = (label[x.tobytes()] for x in seen)
            total, other = a + b, a + b + 1 if a + b < 18 else 17
            picture = [drawn(other if spoil("sum image", i) else total)] if total < 10 else []
            return [words(a, "plus", b, "is", other if spoil("sum text", i) else total), *picture]
        if seen:
            return [words(label[seen[0].tobytes()] + spoil("read", i))]
        if len(asked) == 2:
            spoilt, last = spoil("count word", i), asked[1]
            return [
                part
                for n in range(asked[0], last + 1)
                for part in (words(n + (n == last and spoilt)), drawn(n + (n == last and spoil("count image", i))))
            ]
        return [drawn(asked[0])]

    return answer


NUMBERS = {
    None: "",
    "read": "read_accuracy",
    "sum text": "sum_text_accuracy",
    "sum image": "sum_image_accuracy",
    "mirror": "mirror_correlation",
    "count word": "count_accuracy",
    "count image": "count_accuracy",
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_what_is_right_counts_and_nothing_else(kind):
    """Every fourth answer is wrong in one respect; exactly one number shows it."""
    numbers, page = evaluate(oracle(lambda which, i: which == kind and i % 4 == 0))
    assert [title for title, _ in page.examples] == np.repeat(
        ["Reading", "Adding", "Mirroring", "Counting"], 3
    ).tolist()
    numbers.pop("nll_nats_per_dim")
    name = NUMBERS[kind]
    wrong = numbers.pop(name, None)
    assert all(value == pytest.approx(1) for value in numbers.values()) and len(numbers) == (6 if kind is None else 5)
    if kind == "sum image":  # asked for where the sum is below ten
        labels = digits.split("held_out")[1]
        pairs = np.random.default_rng(0).integers(0, len(labels), (LIMIT, 2))
        below = labels[pairs].sum(1) < 10
        assert wrong == pytest.approx(1 - below[::4].sum() / below.sum()) and wrong < 1
    elif kind == "mirror":
        scans = digits.split("held_out")[0][:LIMIT]
        unlike = [np.corrcoef(x.ravel(), x[:, ::-1].ravel())[0, 1] for x in scans[::4]]
        assert wrong == pytest.approx((15 + sum(unlike)) / LIMIT) and wrong < 0.95
    elif kind:
        assert wrong == pytest.approx(0.75)


def test_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8, 8, 1))
    assert correlation([a, b], 3 * a + 1) == pytest.approx(1) and correlation([a], -a) == pytest.approx(-1)
    assert abs(correlation([a], b)) < 0.5 and correlation([], b) == correlation([np.ones_like(a)], b) == 0


@pytest.mark.parametrize("mean, deviation", ((0.0, 1.0), (-0.4, 0.8)))
def test_the_nll_of_a_gaussian(mean, deviation):
    """The NLL is that of pixels for every codec: 0.5 E[((x + noise - mean) / deviation)^2] + log deviation."""
    scans = digits.split("held_out")[0].astype(np.float64)
    expected = 0.5 * (((scans - mean) ** 2).mean() + 0.1**2) / deviation**2 + np.log(deviation)
    found = held_out_nll(sampler(Gaussian(mean, deviation)))
    assert found == pytest.approx(expected, abs=1e-3)  # of ten draws of the noise
    more = held_out_nll(sampler(Gaussian(mean, deviation)), noise=0.5)
    assert more - found == pytest.approx(0.5 * (0.5**2 - 0.1**2) / deviation**2, abs=5e-3)
