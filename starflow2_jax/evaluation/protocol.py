"""What a benchmark is: tasks for a model, and what its answers are worth."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions


@dataclass(frozen=True, eq=False)
class Task:
    key: str  # unique in the benchmark, and the same in every run: the seeds of its answers depend on it
    prompt: Document
    target: Any  # what the answer is compared with
    options: SampleOptions = SampleOptions()


@dataclass(frozen=True, eq=False)
class Answer:
    task: Task
    k: int  # which of the answers to the task, from 0
    document: Document


@dataclass(frozen=True, eq=False)
class Page:
    """What the report shows beside the numbers and the training curves.

    `grid`: generated images (rows, columns, height, width, C) in [-1, 1], row i of what `names[i]` says.
    `examples`: titles and documents, of which the model made the parts that count as predictions.
    """

    about: str
    title: str  # of the grid
    note: str  # below it
    names: tuple[str, ...]
    grid: np.ndarray
    examples: list[tuple[str, list[Text | Image]]] = field(default_factory=list)


class Benchmark(Protocol):
    """A benchmark that inherits from this class needs no `export`, `score` and `page` of its own."""

    aims: Mapping[str, float] = {}  # what some of the numbers should reach
    samples: int = 1  # answers to each task

    def __init__(self, data: str | None, limit: int | None) -> None:
        """`data`: a file or folder that the tasks are read from; `limit`: tasks of each kind at most (None: its own).

        Raises UserError.
        """

    def tasks(self) -> list[Task]:
        """The tasks, those of equal options one after the other: they run together."""
        ...

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write into `out` what the benchmark's public scorer reads."""

    def score(self, answers: list[Answer], sampler: Sampler) -> dict[str, float | None]:
        """The numbers that can be found here; None where nothing speaks to a number."""
        return {}

    def page(self, answers: list[Answer]) -> Page | None:
        """What the report shows of the answers."""
        return None


def seed_of(base: int, key: str, k: int) -> int:
    """The seed of answer k to a task, below 2^32: it depends on these three alone, not on which other tasks are run."""
    return int.from_bytes(hashlib.sha256(f"{base}/{k}/{key}".encode()).digest()[:4], "big")
