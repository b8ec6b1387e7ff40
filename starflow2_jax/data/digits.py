"""Handwritten digits that ship with scikit-learn (1,797 scans of 8 x 8 pixels), as interleaved documents of five kinds.

scikit-learn and SciPy are imported when the first scan is read, so runs on other sources do not need them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from starflow2_jax.data.documents import Document, Draft, Image, Text
from starflow2_jax.data.protocol import Source
from starflow2_jax.fields import option

WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()
TRAIN = 1500  # scans to train on; the other 297 are held out
LONGEST_COUNT = 5  # numbers

CAPTIONS = (
    "{a} {word}", "draw {a} {word}", "draw the digit {word}",
    "write {a} {word}", "a picture of {a} {word}", "show the number {word}",
)  # fmt: skip
ASKEW = ", askew"  # ends the caption of a warped scan, so that a plain caption means unchanged handwriting
READ = ("which digit is this?", "what number is shown?", "read the digit", "name this number")
SUM = (("", " plus", " is what?"), ("add", " and", ""), ("what is the sum of", " and", "?"))
SUM_ANSWER = " {a} plus {b} is {total}"
MIRROR = ("mirror it", "flip it left to right", "now its mirror image")
COUNT = ("count from {first} to {last}", "from {first} up to {last}", "count on from {first} to {last}")
KINDS = ("caption", "read", "sum", "mirror", "count")
PARTS = {"train": slice(0, TRAIN), "held_out": slice(TRAIN, None)}


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8, 1) fp32 in [-1, 1] and labels (1797,). The first TRAIN scans are for training.

    A scan's levels 0..16 are divided by 8, then 1 is subtracted.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    return (data.images[order, :, :, None] / 8 - 1).astype(np.float32), data.target[order]


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of the "train" (1,500) or "held_out" (297) scans."""
    pixels, labels = scans()
    return pixels[PARTS[name]], labels[PARTS[name]]


def caption(label: int, pixels: np.ndarray, wording: int, askew: bool = False) -> Document:
    """A caption, then its image to generate. askew: the scan is warped."""
    text = CAPTIONS[wording % len(CAPTIONS)].format(a="an" if label == 8 else "a", word=WORDS[label])
    return [Text(text + ASKEW * askew), Image(pixels, generate=True)]


def read(label: int, pixels: np.ndarray, wording: int) -> Document:
    """An image, a question, then the digit's name to predict."""
    return [Image(pixels), Text(READ[wording % len(READ)]), Text(" " + WORDS[label], predict=True)]


def add(labels: Sequence[int], pixels: Sequence[np.ndarray], total_pixels: np.ndarray | None, wording: int) -> Document:
    """A sum of two scans. The answer spells out both digits, then the sum.

    labels: of the two scans. pixels: the two scans. total_pixels: a scan of the sum; None if the sum is above 9.
    """
    before, between, after = SUM[wording % len(SUM)]
    a, b = labels
    answer = SUM_ANSWER.format(a=WORDS[a], b=WORDS[b], total=WORDS[a + b])
    asked = [Text(before), Image(pixels[0]), Text(between), Image(pixels[1]), Text(after)]
    parts = [part for part in asked if not isinstance(part, Text) or part.text] + [Text(answer, predict=True)]
    return parts if total_pixels is None else [*parts, Image(total_pixels, generate=True)]


def mirror(pixels: np.ndarray, wording: int) -> Document:
    """An image, then its mirror image to generate."""
    return [Image(pixels), Text(MIRROR[wording % len(MIRROR)]), Image(pixels[:, ::-1], generate=True)]


def count(first: int, pixels: list[np.ndarray], wording: int) -> Document:
    """Count up from `first`, with one scan for each number."""
    last = WORDS[first + len(pixels) - 1]
    parts: Document = [Text(COUNT[wording % len(COUNT)].format(first=WORDS[first], last=last))]
    for i, scan in enumerate(pixels):
        parts += [Text(" " + WORDS[first + i], predict=True), Image(scan, generate=True)]
    return parts


def warped(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scan (8, 8, 1) turned, sheared, scaled, shifted and bent at random, about as much as two hands differ.

    Standard deviations: 6 degrees for turn and shear, 6 % for scale, a quarter of a pixel for the shift, and a fifth of
    a pixel for the bend at 4 x 4 places, with smooth interpolation between them.
    """
    from scipy.ndimage import map_coordinates, zoom

    turn, shear = rng.normal(0, 0.1, 2)
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, shear - sin], [sin, cos]]) * np.exp(rng.normal(0, 0.06, 2))
    center = (np.array(pixels.shape[:2]) - 1) / 2
    shift = center - matrix @ center + rng.normal(0, 0.25, 2)
    places = np.einsum("ij,jyx->iyx", matrix, np.indices(pixels.shape[:2])) + shift[:, None, None]
    bend = zoom(rng.normal(0, 0.2, (2, 4, 4)), (1, 2, 2), order=2)
    moved = map_coordinates(pixels[..., 0], places + bend, order=3, cval=-1.0)
    return np.clip(moved, -1, 1)[..., None].astype(np.float32)


@dataclass(frozen=True)
class DigitOptions:
    """Which documents are made of the scans."""

    kind: str = option("kind of documents", "caption", choices=KINDS)
    part: str = option("scans that are shown", "train", choices=PARTS)
    warp: float = option(
        "share of the scans that are turned, sheared, scaled, shifted and bent a little", 0.0, least=0, most=1
    )


class Digits(Source):
    """2**32 documents of one kind. Document i depends only on the options and i."""

    Options = DigitOptions

    def __init__(self, path: str = "digits", options: DigitOptions = DigitOptions()):  # noqa: B008 - it is frozen
        self.options = options
        self.pixels, self.labels = split(options.part)
        self.of_label = [np.flatnonzero(self.labels == digit) for digit in range(10)]

    def images(self) -> list[Image]:
        """All scans of this part."""
        return [Image(pixels) for pixels in self.pixels]

    def texts(self) -> list[str]:
        """All wordings of every kind, so that each stage's tokenizer is the same."""
        return texts()

    def __len__(self) -> int:
        return 2**32

    def __getitem__(self, index: int) -> Draft:
        rng = np.random.default_rng((KINDS.index(self.options.kind), index))
        return getattr(self, "_" + self.options.kind)(rng)

    def _scan(self, rng, digit: int) -> np.ndarray:
        return self._warped(rng, rng.choice(self.of_label[digit]))

    def _warped(self, rng, index: int) -> np.ndarray:
        return warped(self.pixels[index], rng) if self._askew(rng) else self.pixels[index]

    def _askew(self, rng) -> bool:
        return self.options.warp > 0 and rng.random() < self.options.warp

    def _caption(self, rng) -> Document:
        i, wording = rng.integers(len(self.labels)), rng.integers(len(CAPTIONS))
        askew = self._askew(rng)
        pixels = warped(self.pixels[i], rng) if askew else self.pixels[i]
        return caption(int(self.labels[i]), pixels, wording, askew)

    def _read(self, rng) -> Document:
        i, wording = rng.integers(len(self.labels)), rng.integers(len(READ))
        return read(int(self.labels[i]), self._warped(rng, i), wording)

    def _sum(self, rng) -> Document:
        digits, wording = rng.integers(0, 10, 2), rng.integers(len(SUM))
        scans = [self._scan(rng, d) for d in digits]
        total = digits.sum()
        return add(digits, scans, self._scan(rng, total) if total < 10 else None, wording)

    def _mirror(self, rng) -> Document:
        return mirror(self._warped(rng, rng.integers(len(self.labels))), rng.integers(len(MIRROR)))

    def _count(self, rng) -> Document:
        first = rng.integers(0, 9)
        length = rng.integers(2, min(LONGEST_COUNT, 10 - first) + 1)
        return count(first, [self._scan(rng, first + i) for i in range(length)], rng.integers(len(COUNT)))


def texts() -> list[str]:
    """Every wording of the documents, for training a tokenizer."""
    corpus = [" " + word for word in WORDS] + [*READ, *MIRROR, ASKEW] + [part for parts in SUM for part in parts]
    corpus += [SUM_ANSWER.format(a=a, b=b, total=b) for a in WORDS for b in WORDS]
    for word in WORDS:
        corpus += [t.format(a=article, word=word) for t in CAPTIONS for article in ("a", "an")]
        corpus += [t.format(first=word, last=other) for t in COUNT for other in WORDS]
    return corpus
