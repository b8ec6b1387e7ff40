"""The table of benchmarks, by the name that `starflow2 eval --benchmark` takes."""

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.digits import DigitsBenchmark
from starflow2_jax.evaluation.protocol import Benchmark
from starflow2_jax.evaluation.scenes import QuickScenesBenchmark, ScenesBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "digits": DigitsBenchmark,
    "scenes": ScenesBenchmark,
    "scenes_quick": QuickScenesBenchmark,
}


def open_benchmark(name: str, data: str | None = None, limit: int | None = None) -> Benchmark:
    """The benchmark `name`; the other arguments are those of `Benchmark`. Raises UserError."""
    if name not in BENCHMARKS:
        raise UserError(
            f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}; if a Python file of yours adds it, name that "
            "file with --import"
        )
    return BENCHMARKS[name](data, limit)
