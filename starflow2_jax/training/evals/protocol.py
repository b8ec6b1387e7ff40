"""The contract of an evaluator, which looks at the parameters while they are trained, and when it does so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Findings:
    """What an evaluation found. numbers: for metrics.jsonl and TensorBoard, by name. pictures: (height, width, 3)
    uint8, for TensorBoard."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)


class Evaluator(Protocol):
    """One entry of a config's `evals`, in one stage.

    What it finds depends on the parameters alone: not on the mesh, the number of hosts, or earlier calls. So a run that
    is resumed finds the same again. It draws from random streams of its own, and trains nothing.
    """

    def __init__(self, name: str, config: Any, task: Any, folder: Path) -> None:
        """name, config: the entry's name and keys. task: the stage's, a StageTask or a CodecTask. folder: of the run;
        files belong into `folder/evals/name`.

        Raises UserError.
        """

    def __call__(self, number: int, state: Any, frozen: Any) -> Findings:
        """Evaluate the parameters of the task's `state` and its `frozen` ones after step `number` of the whole run. All
        processes call it together.
        """
        ...


@dataclass(frozen=True)
class Evaluation:
    """An evaluator with its name and interval."""

    name: str
    every: int  # steps of the whole run; 0: at the end of the stage alone
    evaluate: Evaluator

    def due(self, number: int, last: int) -> bool:
        """Whether it runs after step `number` of a stage whose last step is `last`."""
        return number == last or (self.every > 0 and number % self.every == 0)
