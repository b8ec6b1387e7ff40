"""A short run of scenes_quick on single objects, judged by pictures whose plans are given: what holds drawing back?

It prints the distance of drawn pictures from the exact ones, and the shares with the right ground and sprite.
docs/benchmarks/scenes.md holds the numbers of several settings.

python benchmarks/scenes_given_plans.py --out runs/given
python benchmarks/scenes_given_plans.py --out runs/given_1 --config.model.vlm.embedding_std=1
"""

import argparse
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.scenes.kinds import KINDS, Shown
from starflow2_jax.data.scenes.scene import Scene, render
from starflow2_jax.data.scenes.source import SceneOptions, Scenes, rendered
from starflow2_jax.evaluation.scenes_judge import Judge
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.training.loop import Trainer

NUMBER = 40  # pictures


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="a new checkpoint directory")
    p.add_argument("--words", type=int, default=100, help="steps of pretrain")
    p.add_argument("--steps", type=int, default=200, help="steps of text_to_image")
    a, overrides = p.parse_known_args()
    settings = [text.removeprefix("--config.") for text in overrides]
    config: Any = configs.load("scenes_quick", settings).unlock()
    config.order = ("pretrain", "text_to_image")
    for name, steps in zip(config.order, (a.words, a.steps), strict=True):
        config.stages[name].steps, config.stages[name].mix = steps, dict.fromkeys(KINDS, 0.0) | {"single": 1.0}
    Trainer(config, a.out).run()
    sampler, judge = Sampler.restore(a.out), Judge(objects=60)
    prompts, scenes = given(NUMBER)
    for temperature in (0.0, 0.5):
        options = SampleOptions(
            image_temperature=temperature, image_first=True, max_tokens=sampler.model.cfg.tokens + 2, max_images=1
        )
        drawn = [
            next(part.pixels for part in answer if isinstance(part, Image))
            for answer in sampler.generate(prompts, options)
        ]
        read = [judge(picture) for picture in drawn]
        error = [np.sqrt(np.mean((x - render(scene, len(x))) ** 2)) for x, scene in zip(drawn, scenes, strict=True)]
        ground = [seen.background == scene.background for seen, scene in zip(read, scenes, strict=True)]
        sprite = [seen.counts == scene.counts for seen, scene in zip(read, scenes, strict=True)]
        print(
            f"image temperature {temperature:g}: root mean squared error {np.mean(error):.3f}, "
            f"right grounds {np.mean(ground):.3f}, right sprites {np.mean(sprite):.3f}"
        )


def given(number: int) -> tuple[list[list[Text | Image]], list[Scene]]:
    """Prompts with their plans, and the scenes that the plans tell of."""
    source = Scenes(options=SceneOptions("single", "test", plan=True, quarters=True))
    documents = [source.parts(i) for i in range(number)]
    scenes = [part.scene for parts in documents for part in parts if isinstance(part, Shown)]
    words = [[part for part in parts if isinstance(part, Text)] for parts in documents]
    return [rendered([replace(part, predict=False) for part in parts], 32) for parts in words], scenes


if __name__ == "__main__":
    main()
