"""The protocol of a benchmark: it gives tasks to a model and scores the answers."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions


@dataclass(frozen=True, eq=False)
class Task:
    """A prompt, and the target that its answers are compared with."""

    key: str  # unique in the benchmark and the same in every run, because the seeds of the answers depend on it
    prompt: list[Any]  # a Document, in which images may be StoredImages, which are read when the task's batch begins
    target: Any  # for the benchmark alone
    options: SampleOptions = SampleOptions()
    chat: bool = False  # whether the prompt is what a user says, for the chat template of a tokenizer that has one


@dataclass(frozen=True, eq=False)
class Answer:
    """One of the answers to a task."""

    task: Task
    k: int  # number of the answer among those to the task, from 0
    said: Document | Callable[[], Document]  # or a function that reads it, so that memory need not hold all answers
    pictures: tuple[Path, ...] = ()  # the files of its images, in their order

    @property
    def document(self) -> Document:
        """The answer, read from its files each time."""
        return self.said() if callable(self.said) else self.said


# What a number is the mean of: (value, weight) of each item, such as a question, by a key that is the same in every
# run.
Items = dict[str, tuple[float, float]]
Scores = Mapping[str, float | Items | None]


@dataclass(frozen=True, eq=False)
class Page:
    """The contents of the report besides the numbers and the training curves.

    `grid`: generated images (rows, columns, height, width, C) in [-1, 1]. `examples`: titles and documents; the model
    made the parts that count as predictions.
    """

    about: str  # a paragraph at the top
    title: str  # heading of the grid
    note: str  # explanation of the grid
    names: tuple[str, ...]  # label of each row of the grid
    grid: np.ndarray
    examples: list[tuple[str, list[Text | Image]]] = field(default_factory=list)


class Benchmark(Protocol):
    """Tasks for a model, and the rules that score its answers. A subclass must define only `__init__` and `tasks`."""

    aims: Mapping[str, float] = {}  # the value that a number should reach, for some of the numbers
    samples: int = 1  # answers to each task
    parts: tuple[str, ...] = ()  # the parts of its data that may be asked for; (): it has none
    part: str = ""  # the part that its tasks are from, one of `parts`
    draws: bool = False  # whether it needs a model that makes pictures; others are refused before they are loaded
    facts: Mapping[str, Any] = {}  # what run.json says about the prompts; they are among what decides the answers

    def __init__(self, data: str | None, limit: int | None) -> None:
        """`data`: the file or folder of the tasks; `limit`: most tasks of each kind (None: the benchmark's default).

        Raises UserError for data that cannot be read, or for a limit that the benchmark does not allow.
        """

    def choose(self, part: str) -> None:
        """Take the tasks from `part`, one of `parts`, in place of its own choice. Raises UserError."""
        self.part = part

    def begin(self, sampler: Sampler) -> None:
        """Called before `tasks`, for a benchmark whose tasks depend on the model, such as on the size of its images.

        Raises UserError for a model that the benchmark does not fit.
        """

    def tasks(self) -> list[Task]:
        """The tasks. Neighbouring tasks with equal options run together."""
        ...

    def answer(
        self,
        sampler: Sampler,
        tasks: list[Task],
        prompts: list[Document],
        options: SampleOptions,
        seeds: list[int],
        rows: int,
    ) -> list[Document]:
        """The answers to tasks that run together, `samples` to each; by default, the model draws them.

        prompts: those of the tasks, as the model reads them. options: the same for all of them. seeds: one for each
        answer, which alone decides its random draws. rows: number of tasks in the largest batch. Raises DocumentError
        with the index of the task.
        """
        return sampler.generate(prompts, options, seeds, self.samples, rows)

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write into the empty folder `out` the files that the benchmark's public scorer reads.

        The engine moves them to the answers when all are written.
        """

    def score(self, answers: list[Answer], sampler: Sampler) -> Scores:
        """The numbers that can be computed here, by name; None for a number that no answer contributes to.

        In place of a number that is a mean, its items may be returned; `starflow2 compare` needs them for bootstrap
        intervals.
        """
        return {}

    def page(self, answers: list[Answer]) -> Page | None:
        """The report's page about the answers; None: the report shows numbers and training curves alone."""
        return None


def numbers(scores: Scores) -> dict[str, float | None]:
    """The scores with the weighted mean of their values in place of items; None if there are no items."""
    return {name: _mean(score) if isinstance(score, dict) else score for name, score in scores.items()}


def _mean(items: Items) -> float | None:
    total = math.fsum(weight for _, weight in items.values())
    return math.fsum(value * weight for value, weight in items.values()) / total if items else None


def seed_of(base: int, key: str, k: int) -> int:
    """The seed of answer k to the task `key`, below 2^32. It does not depend on which other tasks run."""
    return int.from_bytes(hashlib.sha256(f"{base}/{k}/{key}".encode()).digest()[:4], "big")
