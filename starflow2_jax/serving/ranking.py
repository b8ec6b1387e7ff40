"""Ranking captions as a task of the worker: a few captions at a time, so that rows can write in between."""

from collections.abc import Callable, Generator

import numpy as np

from starflow2_jax.data.documents import Document
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import bucket
from starflow2_jax.sampling.scoring import BATCH, describe, illustrate, layout, rank

POSITIONS = 4096  # most positions that are scored at once; a longer row is scored alone
Pairs = list[tuple[str, float]]


def ranking(sampler: Sampler, image: np.ndarray, captions: list[str], by_image: bool) -> Generator[None, None, Pairs]:
    """The pieces of `sampling.scoring.rank`, which return its result. The arguments are those of `rank`.

    Raises DocumentError, before the first piece, if the image or a caption does not fit the model.
    """
    template = illustrate if by_image else describe
    longest = max(len(layout(sampler, template(caption, image))["tokens"]) for caption in captions)
    rows = max(1, min(BATCH, POSITIONS // bucket(longest)))
    return _pieces(sampler, image, captions, by_image, template, rows)


def _pieces(
    sampler: Sampler,
    image: np.ndarray,
    captions: list[str],
    by_image: bool,
    template: Callable[[str, np.ndarray], Document],
    rows: int,
) -> Generator[None, None, Pairs]:
    pairs: Pairs = []
    size = max(1, rows - by_image)  # the image without a caption takes one of the rows
    for start in range(0, len(captions), size):
        pairs += rank(sampler, image, captions[start : start + size], by_image, template, rows)
        yield
    return sorted(pairs, key=lambda pair: -pair[1])
