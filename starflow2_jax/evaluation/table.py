"""The table of benchmarks, by the name that `starflow2 eval --benchmark` takes."""

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.choices import Ai2dBenchmark, MmbenchBenchmark, SeedBenchmark
from starflow2_jax.evaluation.coco import CocoBenchmark
from starflow2_jax.evaluation.digits import DigitsBenchmark
from starflow2_jax.evaluation.dpg import DpgBenchmark
from starflow2_jax.evaluation.edits import GeditBenchmark, ImgeditBenchmark
from starflow2_jax.evaluation.geneval import GenevalBenchmark
from starflow2_jax.evaluation.gqa import GqaBenchmark
from starflow2_jax.evaluation.likelihood import LikelihoodBenchmark
from starflow2_jax.evaluation.mme import MmeBenchmark
from starflow2_jax.evaluation.mmmu import MmmuBenchmark
from starflow2_jax.evaluation.protocol import Benchmark
from starflow2_jax.evaluation.scenes import QuickScenesBenchmark, ScenesBenchmark
from starflow2_jax.evaluation.wise import WiseBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    "digits": DigitsBenchmark,
    "scenes": ScenesBenchmark,
    "scenes_quick": QuickScenesBenchmark,
    "geneval": GenevalBenchmark,
    "dpg": DpgBenchmark,
    "wise": WiseBenchmark,
    "gedit": GeditBenchmark,
    "imgedit": ImgeditBenchmark,
    "coco": CocoBenchmark,
    "mmmu": MmmuBenchmark,
    "mmbench": MmbenchBenchmark,
    "mme": MmeBenchmark,
    "gqa": GqaBenchmark,
    "seed": SeedBenchmark,
    "ai2d": Ai2dBenchmark,
    "likelihood": LikelihoodBenchmark,
}


def open_benchmark(name: str, data: str | None = None, limit: int | None = None, part: str | None = None) -> Benchmark:
    """The benchmark `name`; `data` and `limit` are those of `Benchmark`. Raises UserError.

    part: the part of its data, one of its `parts`; None: its own choice.
    """
    if name not in BENCHMARKS:
        raise UserError(
            f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}; if a Python file of yours adds it, "
            f"name that file with --import"
        )
    benchmark = BENCHMARKS[name](data, limit)
    if part is not None:
        if part not in benchmark.parts:
            has = f"has the parts {', '.join(benchmark.parts)}" if benchmark.parts else "has no parts"
            raise UserError(f"the benchmark {name} {has}, and none named {part!r}; change --part or leave it out")
        benchmark.choose(part)
    return benchmark
