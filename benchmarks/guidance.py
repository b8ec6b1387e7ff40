"""Ways of guidance on scenes: shares of right captions and edits; see docs/benchmarks/claims.md.

Captions are the six kinds of GenEval, seen and composed; edits are seen ones. The model writes its own plans. Pictures
are drawn at `--temperature`, because guidance has nothing to mend in pictures without noise.

python benchmarks/guidance.py --checkpoint runs/scenes_fae --seeds 0 1
"""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from starflow2_jax.evaluation.protocol import Answer, Task
from starflow2_jax.evaluation.scenes import GENEVAL, QuickScenesBenchmark, of
from starflow2_jax.sampling.engine import Sampler

ROWS = 64  # answers written at a time
CAPTIONED: dict[str, dict[str, Any]] = {
    "none": dict(guidance=0.0),
    "Gaussian mixing, 1": dict(guidance=1.0),
    "Gaussian mixing, 2": dict(guidance=2.0),
    "Gaussian mixing, annealed, 2": dict(guidance=2.0, annealed=True),
    "linear, 1": dict(guidance=1.0, linear=True),
    "linear, annealed, 2": dict(guidance=2.0, linear=True, annealed=True),
}
EDITED: dict[str, dict[str, Any]] = {  # guidance weighs the text alone where image_guidance is given
    "none": dict(guidance=0.0),
    "text and image together, 1": dict(guidance=1.0),
    "text 1, image 0": dict(guidance=1.0, image_guidance=0.0),
    "text 0, image 1": dict(guidance=0.0, image_guidance=1.0),
    "text 1, image 1": dict(guidance=1.0, image_guidance=1.0),
    "text 2, image 1": dict(guidance=2.0, image_guidance=1.0),
    "text 1, image 2": dict(guidance=1.0, image_guidance=2.0),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="a run on scenes in quarters")
    p.add_argument("--limit", type=int, default=40, help="tasks of each kind and group (default: 40)")
    p.add_argument("--temperature", type=float, default=1.0, help="of images (default: 1)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of sampling (default: 0 1)")
    a = p.parse_args()
    sampler, benchmark = Sampler.restore(a.checkpoint), QuickScenesBenchmark(limit=a.limit)
    benchmark.begin(sampler)
    tasks = benchmark.tasks()
    captions = [task for task in tasks if of(task)[0] in GENEVAL]
    edits = [task for task in tasks if of(task) == ("edit", "seen")]
    for about, several, ways in (("captions", captions, CAPTIONED), ("edits", edits, EDITED)):
        for name, way in ways.items():
            for seed in a.seeds:
                means = shares(sampler, benchmark, several, dict(way, image_temperature=a.temperature), seed)
                print(f"{about}, {name}, seed {seed}: {means}", flush=True)


def shares(
    sampler: Sampler, benchmark: QuickScenesBenchmark, tasks: list[Task], changes: dict[str, Any], seed: int
) -> str:
    """Shares of right answers, seen and composed apart, with these changes of the tasks' own options."""
    right: dict[str, list[bool]] = {}
    for first in range(0, len(tasks), ROWS):
        batch = tasks[first : first + ROWS]
        options = [replace(task.options, **changes) for task in batch]
        drawn = sampler.generate([task.prompt for task in batch], options, seed * len(tasks) + first, rows=ROWS)
        for task, document in zip(batch, drawn, strict=True):
            right.setdefault(of(task)[1], []).append(benchmark.verdict(Answer(task, 0, document)).right)
    return ", ".join(f"{group} {np.mean(values):.3f}" for group, values in right.items())


if __name__ == "__main__":
    main()
