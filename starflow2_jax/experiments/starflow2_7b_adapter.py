"""STARFlow2 on Qwen2.5-VL-7B, stage 2, the visual adapter: image -> words.

It goes on in the directory of the stage before; see starflow2_7b_t2i.py.

starflow2 train --config experiments/starflow2_7b_adapter.py --out runs/7b --config.data.source=answers.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.config import loading as configs


def get_config(runlocal: bool = False, chip: str = "") -> ConfigDict:
    base = Path(__file__).with_name("starflow2_7b_t2i.py")
    order = ("text_to_image", "image_to_text")
    return configs.load(base, runlocal=runlocal, vlm="7b", order=order, chip=chip).unlock()
