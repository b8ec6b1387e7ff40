"""STARFlow2 on Qwen2.5-VL-3B, stage 3: all kinds of documents, interleaved.

It goes on in the directory of the stage before; see starflow2_7b_t2i.py.

starflow2 train --config experiments/starflow2_3b_joint.py --out runs/3b --config.data.source=interleaved.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.config import loading as configs


def get_config(runlocal: bool = False) -> ConfigDict:
    base = Path(__file__).with_name("starflow2_7b_t2i.py")
    return configs.load(base, runlocal=runlocal, vlm="3b", order=("text_to_image", "image_to_text", "joint")).unlock()
