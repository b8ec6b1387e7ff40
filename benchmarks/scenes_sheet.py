"""Draws README's picture: the first prompts of each kind of the benchmark scenes_quick with their pictures, then edits.

python benchmarks/scenes_sheet.py --checkpoint runs/scenes_quick --out docs/images/scenes_sheet.png

No picture is chosen. Prompts are of the group "composed" where their kind has one: combinations that training never
shows.
"""

import argparse
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.scenes.kinds import CAPTIONS
from starflow2_jax.data.scenes.source import NEVER
from starflow2_jax.evaluation.protocol import Task
from starflow2_jax.evaluation.scenes import QuickScenesBenchmark, of
from starflow2_jax.sampling.engine import Sampler

COLUMNS, EDITS = 8, 4
Shown = tuple[str, np.ndarray]  # title and pixels


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="a run of scenes_quick")
    p.add_argument("--out", required=True, help="the PNG file")
    a = p.parse_args()
    sampler, benchmark = Sampler.restore(a.checkpoint), QuickScenesBenchmark(limit=EDITS)
    benchmark.begin(sampler)
    shown: list[Shown] = []
    for kind, number in [*dict.fromkeys(CAPTIONS, 2 * COLUMNS // len(CAPTIONS)).items(), ("edit", EDITS)]:
        group = "seen" if kind in NEVER else "composed"
        asked = {said(task): task for task in reversed(benchmark.tasks()) if of(task) == (kind, group)}  # none twice
        shown += drawn(sampler, list(asked.values())[::-1][:number])
    sheet(shown).savefig(a.out, dpi=110)


def drawn(sampler: Sampler, tasks: list[Task]) -> list[Shown]:
    """The given picture of each task, if there is one, and the picture that the model draws, with the prompt."""
    found: list[Shown] = []
    for task, answer in zip(tasks, sampler.generate([task.prompt for task in tasks], tasks[0].options), strict=True):
        found += [("", part.pixels) for part in task.prompt if isinstance(part, Image)]
        found.append(
            (said(task), next((part.pixels for part in answer if isinstance(part, Image)), np.ones((32, 32, 3))))
        )
    return found


def said(task: Task) -> str:
    """The words of a prompt."""
    return " ".join(part.text for part in task.prompt if isinstance(part, Text))


def sheet(shown: list[Shown]) -> Figure:
    """The pictures in rows, each under its prompt."""
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(1.4 * COLUMNS, 1.75 * rows), layout="constrained")
    for axes, (title, pixels) in zip(figure.subplots(rows, COLUMNS).flat, shown, strict=False):
        axes.imshow(np.clip((pixels + 1) / 2, 0, 1), interpolation="nearest")
        axes.set_title(fill(title, 20), fontsize=8)
        axes.axis("off")
    return figure


if __name__ == "__main__":
    main()
