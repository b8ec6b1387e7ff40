"""STARFlow2 on Qwen2.5-VL-3B, stage 1: caption -> image. See starflow2_7b_t2i.py.

starflow2 convert qwen2_5_vl --from Qwen2.5-VL-3B-Instruct --to vlm_3b
starflow2 init --vlm vlm_3b --config experiments/starflow2_3b_t2i.py --out runs/3b
starflow2 train --config experiments/starflow2_3b_t2i.py --out runs/3b --config.data.source=captions.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.config import loading as configs


def get_config(runlocal: bool = False) -> ConfigDict:
    base = Path(__file__).with_name("starflow2_7b_t2i.py")
    return configs.load(base, runlocal=runlocal, vlm="3b", order=("text_to_image",)).unlock()
