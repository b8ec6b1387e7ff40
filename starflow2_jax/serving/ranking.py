"""Ranking captions as work for the worker: a few at a time, so that the rows go on in between."""

from collections.abc import Generator

import numpy as np

from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import BATCH, describe, illustrate, layout, rank

Pairs = list[tuple[str, float]]


def ranking(sampler: Sampler, image: np.ndarray, captions: list[str], by_image: bool) -> Generator[None, None, Pairs]:
    """What `rank` gives. Raises DocumentError at once for what does not fit the model."""
    template = illustrate if by_image else describe
    for caption in captions:
        layout(sampler, template(caption, image))
    return _pieces(sampler, image, captions, by_image, template)


def _pieces(sampler, image, captions, by_image, template) -> Generator[None, None, Pairs]:
    pairs: Pairs = []
    size = BATCH - by_image  # the image without a caption is scored beside them
    for start in range(0, len(captions), size):
        pairs += rank(sampler, image, captions[start : start + size], by_image, template)
        yield
    return sorted(pairs, key=lambda pair: -pair[1])
