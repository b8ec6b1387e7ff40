"""Trains the flow alone on captioned digits; prints the minutes and the share of digits that a classifier recognises.

The reference TarFlow is judged in the same way; docs/benchmarks/digits.md holds the numbers of both.

python benchmarks/captions.py --out runs/captions --steps 560 --warp 0.6
python benchmarks/captions.py --out runs/captions_long --steps 1450 --warp 0.85 --dropout 0.05
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow2_jax.config import loading as configs
from starflow2_jax.data import digits
from starflow2_jax.evaluation.digits import classify, held_out_nll, images_of
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.training.loop import Trainer

QUICK = Path(__file__).parents[1] / "starflow2_jax/experiments" / "digits_quick.py"


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="a new checkpoint directory")
    p.add_argument("--steps", type=int, default=560, help="steps of the flow")
    p.add_argument("--warp", type=float, default=0.6, help="strength of the random warps of the scans")
    p.add_argument("--dropout", type=float, default=0.0, help="dropout in both flows")
    a = p.parse_args()
    config: Any = configs.load(QUICK).unlock()
    config.order = ("pretrain", "text_to_image")  # pretraining, 130 steps, teaches the VLM its words
    stage = config.stages.text_to_image
    stage.steps, stage.optimizer.final_fraction, stage.optimizer.weight_decay = a.steps, 0.02, 0.1
    stage.mix = {"caption": 1.0}
    config.data.sources.caption.warp, config.evals.val.stages = a.warp, ("joint",)
    config.model.shallow.dropout = config.model.deep.dropout = a.dropout
    Trainer(config, a.out).run(stop_at=config.stages.pretrain.steps)
    begin = time.perf_counter()
    Trainer(config, a.out).run()  # the time includes compiling
    print(f"flow: {(time.perf_counter() - begin) / 60:.1f} minutes")
    sampler = Sampler.restore(a.out)
    print(f"held out: {held_out_nll(sampler):.3f} nats per dimension")
    pixels, _ = digits.split("held_out")
    wanted = np.repeat(np.arange(10), 30)
    prompts = [digits.caption(int(digit), pixels[0], i)[:1] for i, digit in enumerate(wanted)]
    for guidance in (0.0, 2.0):
        options = SampleOptions(temperature=0, guidance=guidance, max_tokens=17, image_first=True)
        drawn = [images_of(answer)[0] for answer in sampler.generate(prompts, options)]
        print(f"guidance {guidance:g}: {np.mean(classify(drawn) == wanted):.3f} of 300 digits are right")


if __name__ == "__main__":
    main()
