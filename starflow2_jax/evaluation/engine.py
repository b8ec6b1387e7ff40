"""Runs any benchmark: answers its tasks into a folder that processes may share, then scores the answers."""

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.images import read_image
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Page, Task, seed_of
from starflow2_jax.sampling import batch_files
from starflow2_jax.sampling.batch_files import Prompt, Share
from starflow2_jax.sampling.engine import Sampler


def evaluate(
    sampler: Sampler,
    benchmark: Benchmark,
    out: Path,
    run: dict[str, Any],
    seed: int = 0,
    batch: int = 64,
    share: Share = Share(),  # noqa: B008 - it is frozen
    progress: bool = True,
) -> tuple[dict[str, float | None], Page | None] | None:
    """The benchmark's numbers and the contents of its report; None if other processes still have answers to write.

    The answers are files in `out` (see `sampling.batch_files`); answers that are there already are not drawn again.
    `run`: the settings besides the tasks that decide the answers. `batch`: most prompts that run at once. Raises
    UserError.
    """
    benchmark.begin(sampler)
    tasks = benchmark.tasks()
    prompts = [
        Prompt(
            task.key,
            partial(_prompt, task),
            task.options.sized(sampler.model.cfg.tokens),
            tuple(seed_of(seed, task.key, k) for k in range(benchmark.samples)),
            f"task {task.key}: ",
        )
        for task in tasks
    ]
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise UserError("two tasks of the benchmark have the same key; give each its own")
    batch_files.begin(out, run | {"tasks": digest(tasks), "samples": benchmark.samples})
    if not batch_files.write(sampler, prompts, out, batch, share=share, progress=progress):
        return None
    lines = batch_files.answered(out, prompts)
    answers = [
        Answer(task, k, _document(line["parts"], out, sampler))
        for task in tasks
        for k, line in enumerate(lines[task.key])
    ]
    benchmark.export(answers, out)
    return benchmark.score(answers, sampler), benchmark.page(answers)


def digest(tasks: list[Task]) -> str:
    """Sixteen hexadecimal digits of a hash of the tasks: their keys, options and prompts."""
    total = hashlib.sha256()
    for task in tasks:
        total.update(repr((task.key, asdict(task.options))).encode())
        for part in task.prompt:
            total.update(part.text.encode() if isinstance(part, Text) else np.ascontiguousarray(part.pixels).tobytes())
    return total.hexdigest()[:16]


def _prompt(task: Task) -> Document:
    """The task's prompt, as `Prompt.read` returns it."""
    return task.prompt


def _document(parts: list[dict[str, str]], out: Path, sampler: Sampler) -> Document:
    """A written answer as a document; all its parts count as the model's predictions."""
    return [
        Image(read_image(out / part["image"], sampler.codec.image_channels), generate=True)
        if "image" in part
        else Text(part["text"], predict=True)
        for part in parts
    ]
