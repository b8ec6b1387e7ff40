"""A short run of scenes_quick on captions of a few kinds, judged by pictures whose plans are given: how well does it
draw, whatever its words?

It prints, for each kind, the distance of drawn pictures from the exact ones, the shares with the right ground and the
right sprites, and the seconds of a picture. docs/benchmarks/scenes.md and fae.md hold the numbers of several
settings.

python benchmarks/scenes_given_plans.py --out runs/given
python benchmarks/scenes_given_plans.py --out runs/given_1 --config.model.vlm.embedding_std=1
python benchmarks/scenes_given_plans.py --kinds single two --steps 800 --out runs/given_two
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.scenes.kinds import CAPTIONS, KINDS, Shown
from starflow2_jax.data.scenes.scene import Scene, render
from starflow2_jax.data.scenes.source import SceneOptions, Scenes, rendered
from starflow2_jax.evaluation.scenes_judge import Judge
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.training.loop import Trainer

NUMBER = 40  # pictures of a kind


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="a new checkpoint directory")
    p.add_argument("--kinds", nargs="+", choices=CAPTIONS, default=["single"], help="of captions (default: single)")
    p.add_argument("--words", type=int, default=100, help="steps of pretrain")
    p.add_argument("--steps", type=int, default=200, help="steps of text_to_image")
    a, overrides = p.parse_known_args()
    settings = [text.removeprefix("--config.") for text in overrides]
    config: Any = configs.load("scenes_quick", settings).unlock()
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    config.order = ("pretrain", "text_to_image")
    for name, steps in zip(config.order, (a.words, a.steps), strict=True):
        config.stages[name].steps = steps
        config.stages[name].mix = dict.fromkeys(KINDS, 0.0) | dict.fromkeys(a.kinds, 1.0)
    Trainer(config, a.out).run()
    sampler, judge = Sampler.restore(a.out), Judge(objects=60)
    for kind in a.kinds:
        for part in ("test",) if kind in ("single", "background") else ("test", "held_out"):
            prompts, scenes = given(kind, part)
            drawn = draw(sampler, prompts)  # compiles
            start = time.perf_counter()
            drawn = draw(sampler, prompts)
            seconds = (time.perf_counter() - start) / NUMBER
            read = [judge(picture) for picture in drawn]
            error = [np.sqrt(np.mean((x - render(scene, len(x))) ** 2)) for x, scene in zip(drawn, scenes, strict=True)]
            ground = [seen.background == scene.background for seen, scene in zip(read, scenes, strict=True)]
            sprites = [seen.counts == scene.counts for seen, scene in zip(read, scenes, strict=True)]
            print(
                f"{kind}, {part}: root mean squared error {np.mean(error):.3f}, right grounds {np.mean(ground):.3f}, "
                f"right sprites {np.mean(sprites):.3f}, {seconds:.3f} s a picture"
            )


def draw(sampler: Sampler, prompts: list[list[Text | Image]]) -> list[np.ndarray]:
    """A picture for each prompt, at image temperature 0."""
    options = SampleOptions(
        image_temperature=0.0, image_first=True, max_tokens=sampler.model.cfg.tokens + 2, max_images=1
    )
    answers = sampler.generate(prompts, options)
    return [next(part.pixels for part in answer if isinstance(part, Image)) for answer in answers]


def given(kind: str, part: str) -> tuple[list[list[Text | Image]], list[Scene]]:
    """Prompts with their plans, and the scenes that the plans tell of."""
    source = Scenes(options=SceneOptions(kind, part, plan=True, quarters=True))
    documents = [source.parts(i) for i in range(NUMBER)]
    scenes = [part.scene for parts in documents for part in parts if isinstance(part, Shown)]
    words = [[part for part in parts if isinstance(part, Text)] for parts in documents]
    return [rendered([replace(part, predict=False) for part in parts], 32) for parts in words], scenes


if __name__ == "__main__":
    main()
