"""The benchmark digits: a model writes, reads, adds, mirrors and counts digits, judged by a classifier."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from starflow2_jax.data import digits
from starflow2_jax.data.documents import Document, Image, Text, counts
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Page, Scores, Task
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.sampling.scoring import score

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
LIMIT = 300  # tasks of each kind
WRITE = SampleOptions(temperature=0, image_temperature=0.6, guidance=2.0, max_tokens=20)
ANSWER = SampleOptions(temperature=0, image_temperature=0.3, max_tokens=28)
MIRROR = SampleOptions(temperature=0, image_temperature=0.0, max_tokens=28)
ADD = SampleOptions(temperature=0, image_temperature=0.4, guidance=1.0, max_tokens=28)
COUNT = SampleOptions(temperature=0, image_temperature=0.5, guidance=1.0, max_tokens=108)
ABOUT = (
    "STARFlow2 is one causal model that reads and writes both text and images: a frozen vision-language model and an "
    "autoregressive normalizing flow over the same sequence, tied by two skips. "
    "This page shows what a small model, trained from scratch in this run, does with handwritten digits of 8 × 8 "
    "pixels."
)
TITLES = {"read": "Reading", "sum": "Adding", "mirror": "Mirroring", "count": "Counting"}  # of the page's examples
EXAMPLES = 3  # examples of each kind on the page


class DigitsBenchmark(Benchmark):
    """Five kinds of tasks over held-out scans; a task's key is "kind/number".

    Raises UserError for `data` or a small limit.
    """

    aims = AIMS

    def __init__(self, data: str | None = None, limit: int | None = None):
        if data is not None:
            raise UserError("the benchmark digits brings its own data; leave --data out")
        self.limit = LIMIT if limit is None else limit
        if self.limit < 10:
            raise UserError("--limit must be at least 10, one digit of each kind")

    def tasks(self) -> list[Task]:
        """The tasks, by kind. Their targets are: "write" the digit, "read" its word, "sum" the number, "mirror" the
        mirrored pixels, "count" the first and the last digit."""
        pixels, labels = digits.split("held_out")
        n = min(self.limit, len(labels))
        found = []

        def add(kind: str, i: int, document: Document, target: Any, options: SampleOptions) -> None:
            found.append(Task(f"{kind}/{i}", split_answer(document)[0], target, options))

        for i, digit in enumerate(np.repeat(np.arange(10), self.limit // 10)):
            add("write", i, digits.caption(int(digit), pixels[0], i), digit, WRITE)
        for i in range(n):
            add("read", i, digits.read(labels[i], pixels[i], i), digits.WORDS[labels[i]], ANSWER)
        for i, pair in enumerate(np.random.default_rng(0).integers(0, len(labels), (n, 2))):
            total = labels[pair].sum()
            add("sum", i, digits.add(labels[pair].tolist(), list(pixels[pair]), None, i), total, ADD)
        for i in range(n):
            add("mirror", i, digits.mirror(pixels[i], i), pixels[i, :, ::-1], MIRROR)
        spans = [(a, b) for a in range(9) for b in range(a + 1, min(10, a + digits.LONGEST_COUNT))]
        for i, (a, b) in enumerate((spans * 2)[: self.limit // 5]):
            add("count", i, digits.count(a, [pixels[0]] * (b - a + 1), i), (a, b), COUNT)
        return found

    def score(self, answers: list[Answer], sampler: Sampler) -> Scores:
        """The numbers of AIMS without the seconds: shares of right answers, and the images' NLL."""
        kinds = ("write", *TITLES)
        found = {kind: [(a.task.key, a.document, a.task.target) for a in of_kind(answers, kind)] for kind in kinds}
        right = {
            "digit_accuracy": {key: _shows(images_of(d)[:1], [digit]) for key, d, digit in found["write"]},
            "read_accuracy": {key: words_of(d) == [word] for key, d, word in found["read"]},
            "sum_text_accuracy": {key: words_of(d)[-1:] == [digits.WORDS[n]] for key, d, n in found["sum"]},
            "sum_image_accuracy": {  # of sums that a digit can show
                key: _shows(images_of(d), [n]) for key, d, n in found["sum"] if n < 10
            },
            "mirror_correlation": {key: correlation(images_of(d), pixels) for key, d, pixels in found["mirror"]},
            "count_accuracy": {
                key: words_of(d) == digits.WORDS[a : b + 1] and _shows(images_of(d), range(a, b + 1))
                for key, d, (a, b) in found["count"]
            },
        }
        items = {name: {key: (float(x), 1.0) for key, x in values.items()} for name, values in right.items()}
        return {"nll_nats_per_dim": held_out_nll(sampler, self.limit), **items}

    def page(self, answers: list[Answer]) -> Page:
        """The digits that the model drew, and the first answers of the other kinds."""
        written = [images_of(answer.document) for answer in of_kind(answers, "write")]
        black = np.full_like(digits.split("held_out")[0][0], -1)  # shown if the answer has no image
        grid = np.stack([images[0] if images else black for images in written]).reshape(10, -1, *black.shape)
        examples = [
            (title, [*answer.task.prompt, *answer.document])
            for kind, title in TITLES.items()
            for answer in of_kind(answers, kind)[:EXAMPLES]
        ]
        note = "Drawn by the model when asked for the digit named on the left."
        return Page(ABOUT, "Generated digits", note, tuple(digits.WORDS[:10]), grid, examples)


def of_kind(answers: list[Answer], kind: str) -> list[Answer]:
    """The answers to tasks of one kind."""
    return [answer for answer in answers if answer.task.key.startswith(f"{kind}/")]


@cache
def judge() -> Any:
    """The classifier: a support vector machine (sklearn.svm.SVC) of the 1,500 training scans in 0..16."""
    from sklearn.svm import SVC

    pixels, labels = digits.split("train")
    gamma: Any = 0.001  # scikit-learn takes a number, too; type checkers read its default's type
    return SVC(gamma=gamma).fit(_levels(pixels), labels)


def classify(images: list[np.ndarray]) -> np.ndarray:
    """Pixels (n, 8, 8, 1) in [-1, 1] -> labels (n,)."""
    return judge().predict(_levels(np.stack(images)))


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels (n, 8, 8, 1) in [-1, 1] -> the classifier's input (n, 64) in 0..16."""
    return np.clip((pixels + 1) * 8, 0, 16).reshape(len(pixels), -1)


def _shows(images: list[np.ndarray], wanted: Sequence[int]) -> bool:
    """Whether there is an image, and the images show exactly the digits `wanted` in this order."""
    return len(images) == len(wanted) and bool((classify(images) == np.array(wanted)).all()) if images else False


def images_of(document: Document) -> list[np.ndarray]:
    """Pixels of the images of a document."""
    return [part.pixels for part in document if isinstance(part, Image)]


def correlation(images: list[np.ndarray], wanted: np.ndarray) -> float:
    """The correlation of the first image's pixels with those wanted; 0 for no image, or one of a single colour."""
    return np.corrcoef(images[0].ravel(), wanted.ravel())[0, 1] if images and images[0].std() else 0.0


def words_of(document: Document) -> list[str]:
    """The words of all texts of a document."""
    return " ".join(part.text for part in document if isinstance(part, Text)).split()


def split_answer(document: Document) -> tuple[Document, Document]:
    """A training document -> its prompt and its answer, which begins at the first part that counts as a prediction."""
    first = next(i for i, part in enumerate(document) if counts(part))
    return document[:first], document[first:]


def held_out_nll(sampler: Sampler, limit: int = 297, draws: int = 10, noise: float = 0.1, seed: int = 0) -> float:
    """NLL of the first `limit` held-out scans given their captions, in nats per pixel, without 0.5 ln 2 pi.

    `draws` draws of noise N(0, noise^2) are added to each scan, as in training.
    """
    pixels, labels = digits.split("held_out")
    pixels, rng = pixels[:limit], np.random.default_rng(seed)
    documents = [
        digits.caption(labels[i], scan.astype(np.float32), i)
        for _ in range(draws)
        for i, scan in enumerate(pixels + noise * rng.standard_normal(pixels.shape))
    ]
    scores = score(sampler, documents, batch_size=256)
    return float(np.mean([image.nats_per_dim for [image] in scores])) - 0.5 * math.log(2 * math.pi)
