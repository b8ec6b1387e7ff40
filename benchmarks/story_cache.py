"""What the reuse of caches is worth in stories of several pictures: seconds, and right stories.

For "reused", the model writes a whole story, and what it wrote stays in its caches. For "reencoded", a new session
begins after each picture and reads the story so far, with its pictures rounded to 8 bits as in a PNG file. The seconds
of reading again are those after the first picture. All seconds of "reencoded" are too many for a fair ratio, because
each session writes the rest of the story. See docs/benchmarks/claims.md.

python benchmarks/story_cache.py --checkpoint runs/scenes_quick --stories 100
"""

import argparse
import time

import jax
import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.evaluation.protocol import Answer, Task
from starflow2_jax.evaluation.scenes import PICTURES, QuickScenesBenchmark, of
from starflow2_jax.sampling.engine import Sampler

BATCH = 20


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="a run of scenes_quick")
    p.add_argument("--stories", type=int, default=100, help="stories (default: 100)")
    a = p.parse_args()
    sampler, benchmark = Sampler.restore(a.checkpoint), QuickScenesBenchmark(limit=a.stories)
    benchmark.begin(sampler)
    tasks = [task for task in benchmark.tasks() if of(task) == ("story", "seen")]
    batches = [tasks[i : i + BATCH] for i in range(0, len(tasks), BATCH)]
    for tell in (reused, reencoded):
        tell(sampler, batches[0])  # compiles
        begin, reading, answers = time.perf_counter(), 0.0, []
        for batch in batches:
            documents, seconds = tell(sampler, batch)
            answers += documents
            reading += seconds
        total = time.perf_counter() - begin
        right = [benchmark.verdict(Answer(task, 0, answer)).right for task, answer in zip(tasks, answers, strict=True)]
        print(f"{tell.__name__}: {np.mean(right):.2f} right, {total:.1f} s, {reading:.1f} s of them reading again")


def reused(sampler: Sampler, tasks: list[Task]) -> tuple[list[Document], float]:
    """The stories, and the seconds of reading again: none."""
    return sampler.generate([task.prompt for task in tasks], tasks[0].options), 0.0


def reencoded(sampler: Sampler, tasks: list[Task]) -> tuple[list[Document], float]:
    """The stories, and the seconds of reading them again after their pictures."""
    told: list[Document] = [[] for _ in tasks]
    ended, reading = [False] * len(tasks), 0.0
    for turn in range(PICTURES["story"]):
        session = sampler.session(tasks[0].options, list(range(len(tasks))))
        begin = time.perf_counter()
        session.read(
            [[*task.prompt, *story] for task, story in zip(tasks, told, strict=True)], room=tasks[0].options.max_tokens
        )
        jax.block_until_ready(session.rows)
        reading += (time.perf_counter() - begin) if turn else 0.0  # the first reads prompts alone
        for i, answer in enumerate(session.write()):
            if not ended[i]:
                told[i] += (step := as_files(up_to_picture(answer)))
                ended[i] = not any(isinstance(part, Image) for part in step)
    return told, reading


def up_to_picture(answer: Document) -> Document:
    """The parts up to the first picture, or all parts if there is none."""
    ends = [i for i, part in enumerate(answer) if isinstance(part, Image)]
    return answer[: ends[0] + 1] if ends else answer


def as_files(parts: Document) -> Document:
    """The parts as a prompt has them, with pictures of 8-bit levels."""
    return [
        Text(part.text)
        if isinstance(part, Text)
        else Image(np.rint((part.pixels + 1) * 127.5).clip(0, 255) / 127.5 - 1)
        for part in parts
    ]


if __name__ == "__main__":
    main()
