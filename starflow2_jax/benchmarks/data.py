"""Measures how fast the data pipeline makes batches, and how full they are."""

import time
from pathlib import Path

import numpy as np

from starflow2_jax import sequence
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.config.schema import Config
from starflow2_jax.sequence import Sequence
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.program import find_stage


def measure(config: Config, stage: str | None, steps: int, folder: Path) -> dict:
    """Documents, tokens, pixels and patches per second over `steps` batches, with no training beside them. The first
    batch is timed on its own.

    Rates per reader are divided by `data.workers`, or by 1 if the run reads in its own process.

    `stage`: a name or number, see `find_stage`. `folder`: the Trainer's checkpoint directory, to which nothing is
    written. Raises ConfigError.
    """
    trainer, chosen_stage = Trainer(config, folder), find_stage(config, stage)
    begin = time.perf_counter()
    stream = trainer.task(chosen_stage.name).batches()
    next(stream)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    batches = [block for _ in range(steps) for block in next(stream).values()]
    seconds = time.perf_counter() - begin
    stream.close()
    documents, tokens = (sum(count(b) for b in batches) for count in (documents_in, tokens_in))
    pixels = sum(pixels_in(b, trainer.codec) for b in batches)
    patches = sum(patches_in(b) for b in batches)
    readers = max(config.data.workers, 1)
    return {
        "stage": chosen_stage.name,
        "batches": steps,
        "workers": config.data.workers,
        "threads": config.data.threads,
        "first_batch_seconds": first,
        "batch_seconds": seconds / steps,
        "documents_per_second": documents / seconds,
        "documents_per_second_and_reader": documents / seconds / readers,
        "pixels_per_second_and_reader": pixels / seconds / readers,
        "patches_per_second_and_reader": patches / seconds / readers,
        "tokens_per_second": tokens / seconds,
        "packing_efficiency": tokens / sum(b.tokens.size for b in batches),
        "documents_per_row": documents / sum(len(b.tokens) for b in batches),
    }


def pixels_in(batch: Sequence, codec: Codec) -> int:
    """Number of pixels in a batch's flow images; if the codec takes latents, number of tokens."""
    (height, width, _), (rows, columns) = codec.image_shape, codec.grid
    return int(np.sum(np.asarray(batch.modality) == sequence.FLOW)) * height * width // (rows * columns)


def patches_in(batch: Sequence) -> int:
    """Number of patches of a batch that the vision tower reads."""
    return 0 if batch.vision is None else int(np.sum(np.asarray(batch.vision.image) > 0))


def documents_in(batch: Sequence) -> int:
    """Number of documents in a packed batch. Each row numbers its documents from 1 in `segments`."""
    return int(np.max(batch.segments, axis=1).sum())


def tokens_in(batch: Sequence) -> int:
    """Number of positions of a batch that are not padding."""
    return int(np.sum(np.asarray(batch.modality) != sequence.PAD))
