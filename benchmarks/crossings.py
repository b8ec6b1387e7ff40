"""The joint stage of scenes with both skips, with one, or with none; see docs/benchmarks/claims.md.

All runs begin from one run, which has not begun this stage; earlier stages that it has not done are trained, too. A
skip that is left out is not trained: its weights stay zero, as they are at first. `--config.KEY` sets a key.

starflow2 train --config scenes_fae --config.codec.path=runs/fae_scenes --config.order=pretrain,text_to_image \\
    --out runs/begin
python benchmarks/crossings.py --begin runs/begin --skips w_vlm --seed 1 --out runs/w_vlm_1 \\
    --config.codec.path=runs/fae_scenes
starflow2 eval --benchmark scenes_quick --checkpoint runs/w_vlm_1 --out runs/w_vlm_1_report
"""

import argparse
import shutil
from dataclasses import replace
from typing import Any

import jax

from starflow2_jax.config import loading as configs
from starflow2_jax.stages import STAGES
from starflow2_jax.training.loop import Trainer

SKIPS = ("w_vlm", "w_d")  # into the deep flow, and out of it


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--begin", required=True, help="a run of scenes that has not begun joint")
    p.add_argument("--experiment", default="scenes_fae", help="the config of that run (default: scenes_fae)")
    p.add_argument("--skips", nargs="*", default=SKIPS, choices=SKIPS, help="the skips to train (default: both)")
    p.add_argument("--steps", type=int, default=300, help="steps of joint (default: 300)")
    p.add_argument("--seed", type=int, default=0, help="seed of the data's order and of the noise (default: 0)")
    p.add_argument("--out", required=True, help="a new checkpoint directory")
    a, overrides = p.parse_known_args()
    joint = STAGES["joint"]
    STAGES["joint"] = replace(joint, trains=tuple(g for g in joint.trains if g not in SKIPS or g in a.skips))
    shutil.copytree(a.begin, a.out)
    settings = [
        f"stages.joint.steps={a.steps}",
        f"seed={a.seed}",
        *(text.removeprefix("--config.") for text in overrides),
    ]
    config: Any = configs.load(a.experiment, settings)
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    Trainer(config, a.out).run()


if __name__ == "__main__":
    main()
