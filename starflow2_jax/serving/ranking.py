"""Ranking captions as a task of the worker, a few captions at a time, so that rows go on in between."""

from collections.abc import Generator

import numpy as np

from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import bucket
from starflow2_jax.sampling.scoring import BATCH, describe, illustrate, layout, rank

POSITIONS = 4096  # of the rows that are scored at once; a single longer row is scored alone
Pairs = list[tuple[str, float]]


def ranking(sampler: Sampler, image: np.ndarray, captions: list[str], by_image: bool) -> Generator[None, None, Pairs]:
    """`sampling.scoring.rank` as a generator. Raises DocumentError at once if the image or a caption does not fit the model."""
    template = illustrate if by_image else describe
    longest = max(len(layout(sampler, template(caption, image))["tokens"]) for caption in captions)
    rows = max(1, min(BATCH, POSITIONS // bucket(longest)))
    return _pieces(sampler, image, captions, by_image, template, rows)


def _pieces(sampler, image, captions, by_image, template, rows) -> Generator[None, None, Pairs]:
    pairs: Pairs = []
    size = max(1, rows - by_image)  # the image without a caption takes one of the rows
    for start in range(0, len(captions), size):
        pairs += rank(sampler, image, captions[start : start + size], by_image, template, rows)
        yield
    return sorted(pairs, key=lambda pair: -pair[1])
