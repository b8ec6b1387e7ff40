"""What benchmarks of drawing share: a caption goes in, and pictures come out."""

from dataclasses import dataclass, replace
from typing import Any

from starflow2_jax.evaluation.protocol import Benchmark, Task
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions

DRAW = SampleOptions(temperature=0, image_temperature=0.9, guidance=1.0, image_first=True, max_images=1)


@dataclass(frozen=True, eq=False)
class Asked:
    """What a picture is asked for with. key: unique in the benchmark. target: what the benchmark needs for its
    files.
    """

    key: str
    prompt: list[Any]  # as in Task
    target: Any = None


class Drawing(Benchmark):
    """A benchmark of pictures. Its `__init__` sets `asked`, all tasks in the order of the user's file, and `limit`."""

    draws = True
    asked: list[Asked]
    limit: int | None = None
    tokens: int = 0

    def begin(self, sampler: Sampler) -> None:
        """Take the number of tokens of a picture from the model."""
        self.tokens = sampler.model.cfg.tokens

    def tasks(self) -> list[Task]:
        """The first `limit` tasks."""
        options = replace(DRAW, max_tokens=self.tokens + 2)
        return [Task(each.key, each.prompt, each.target, options) for each in self.asked[: self.limit]]
