"""How well a model writes, reads, adds, mirrors and counts digits, judged by an independent classifier."""

from functools import cache

import jax
import numpy as np

from starflow2_jax.data import digits
from starflow2_jax.data.documents import Document, Image, Text, counts
from starflow2_jax.data.pipeline import collate
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sequence import Shape
from starflow2_jax.training.losses import image_nll

AIMS = {
    "digit_accuracy": 0.95,
    "nll_nats_per_dim": -1.06,
    "read_accuracy": 0.95,
    "sum_text_accuracy": 0.90,
    "sum_image_accuracy": 0.85,
    "mirror_correlation": 0.90,
    "count_accuracy": 0.80,
    "train_seconds": 600,
    "total_seconds": 720,
}
WRITE = SampleOptions(temperature=0, image_temperature=0.6, guidance=2.0, max_tokens=20)
ANSWER = SampleOptions(temperature=0, image_temperature=0.3, max_tokens=28)
MIRROR = SampleOptions(temperature=0, image_temperature=0.0, max_tokens=28)
ADD = SampleOptions(temperature=0, image_temperature=0.4, guidance=1.0, max_tokens=28)
COUNT = SampleOptions(temperature=0, image_temperature=0.5, guidance=1.0, max_tokens=108)


@cache
def judge():
    """A support vector machine on the 1,500 training scans, scaled to 0..16."""
    from sklearn.svm import SVC

    pixels, labels = digits.split("train")
    return SVC(gamma=0.001).fit(_levels(pixels), labels)


def classify(images: list[np.ndarray]) -> np.ndarray:
    """Pixels (n, 8, 8, 1) in [-1, 1] -> labels (n,)."""
    return judge().predict(_levels(np.stack(images)))


def _levels(pixels: np.ndarray) -> np.ndarray:
    return np.clip((pixels + 1) * 8, 0, 16).reshape(len(pixels), -1)


def images_of(document: Document) -> list[np.ndarray]:
    return [part.pixels for part in document if isinstance(part, Image)]


def correlation(images: list[np.ndarray], wanted: np.ndarray) -> float:
    """Of the first image's pixels with those wanted; 0 where there is none, or nothing on it."""
    return np.corrcoef(images[0].ravel(), wanted.ravel())[0, 1] if images and images[0].std() else 0.0


def words_of(document: Document) -> list[str]:
    return " ".join(part.text for part in document if isinstance(part, Text)).split()


def split_answer(document: Document) -> tuple[Document, Document]:
    """A training document -> its prompt and its answer: what comes from the first part to be predicted on."""
    first = next(i for i, part in enumerate(document) if counts(part))
    return document[:first], document[first:]


def evaluate(sampler: Sampler, limit: int = 300, seed: int = 0) -> tuple[dict[str, float | None], dict]:
    """All numbers of the report but the times, and samples to show: {"grid": (10, n, 8, 8, 1), "examples": [...]}.

    `limit`: documents a task at most; a number that no document speaks to is None.
    """
    pixels, labels = digits.split("held_out")
    rng = np.random.default_rng(seed)
    numbers, examples = {"nll_nats_per_dim": held_out_nll(sampler, limit)}, []

    wanted = np.repeat(np.arange(10), max(limit // 10, 1))
    prompts = [digits.caption(d, pixels[0], i)[:1] for i, d in enumerate(wanted)]
    written = [images_of(d)[:1] for d in sampler.generate(prompts, WRITE, seed)]
    numbers["digit_accuracy"] = np.mean([_shows(images, [d]) for images, d in zip(written, wanted, strict=True)])
    black = np.full_like(pixels[0], -1)  # shown where no image was written
    grid = np.stack([images[0] if images else black for images in written]).reshape(10, -1, *black.shape)

    def answers(documents: list[Document], options: SampleOptions, title: str, show: int = 3) -> list[Document]:
        prompts = [split_answer(d)[0] for d in documents]
        answered = sampler.generate(prompts, options, seed)
        examples.extend((title, p + a) for p, a in list(zip(prompts, answered, strict=True))[:show])
        return answered

    n = min(limit, len(labels))
    found = answers([digits.read(labels[i], pixels[i], i) for i in range(n)], ANSWER, "Reading")
    numbers["read_accuracy"] = np.mean(
        [words_of(a) == [digits.WORDS[d]] for a, d in zip(found, labels[:n], strict=True)]
    )

    pairs = rng.integers(0, len(labels), (n, 2))
    totals = labels[pairs].sum(1)
    asked = [
        digits.add(labels[p], pixels[p], pixels[0] if t < 10 else None, i)
        for i, (p, t) in enumerate(zip(pairs, totals, strict=True))
    ]
    found = answers(asked, ADD, "Adding")
    numbers["sum_text_accuracy"] = np.mean(
        [words_of(a)[-1:] == [digits.WORDS[t]] for a, t in zip(found, totals, strict=True)]
    )
    drawn = [(images_of(a), t) for a, t in zip(found, totals, strict=True) if t < 10]
    numbers["sum_image_accuracy"] = np.mean([_shows(images, [t]) for images, t in drawn]) if drawn else None

    found = answers([digits.mirror(pixels[i], i) for i in range(n)], MIRROR, "Mirroring")
    numbers["mirror_correlation"] = np.mean(
        [correlation(images_of(a), pixels[i, :, ::-1]) for i, a in enumerate(found)]
    )

    spans = [(a, b) for a in range(9) for b in range(a + 1, min(10, a + digits.LONGEST_COUNT))]
    spans = (spans * 2)[: max(limit // 5, 1)]
    found = answers(
        [digits.count(a, [pixels[0]] * (b - a + 1), i) for i, (a, b) in enumerate(spans)], COUNT, "Counting"
    )
    right = [
        words_of(x) == digits.WORDS[a : b + 1] and _shows(images_of(x), range(a, b + 1))
        for x, (a, b) in zip(found, spans, strict=True)
    ]
    numbers["count_accuracy"] = np.mean(right)
    numbers = {name: None if value is None else float(value) for name, value in numbers.items()}
    return numbers, {"grid": grid, "examples": examples}


def _shows(images: list[np.ndarray], wanted) -> bool:
    """Are there as many images as `wanted`, one at least, and is each the digit it is to be?"""
    return len(images) == len(wanted) and bool((classify(images) == np.array(wanted)).all()) if images else False


def held_out_nll(sampler: Sampler, limit: int = 297, draws: int = 10, noise: float = 0.1, seed: int = 0) -> float:
    """Nats per pixel given the caption, without the 0.5 ln 2 pi, of the held-out scans plus noise N(0, 0.1^2)."""
    pixels, labels = digits.split("held_out")
    features = [
        sampler.encoder(digits.caption(d, p, i))
        for i, (d, p) in enumerate(zip(labels[:limit], pixels[:limit], strict=True))
    ]
    batch = collate(features, Shape(len(features), 32, 1))
    N, D = batch.latents.shape[2:]

    @jax.jit
    def nll(params, key):
        noisy = batch.latents + noise / np.asarray(sampler.codec.std) * jax.random.normal(key, batch.latents.shape)
        seen = batch.replace(latents=noisy)
        output = sampler.model.apply({"params": params}, seen, skips=sampler.skips)
        return image_nll(output, seen).mean() / (N * D)

    keys = jax.random.split(jax.random.key(seed), draws)
    return float(np.mean([nll(sampler.params, k) for k in keys])) - sampler.codec.log_volume
