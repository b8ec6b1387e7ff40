"""STARFlow2 on Qwen2.5-VL-3B, stage 1: caption -> image. See starflow2_7b_t2i.py.

starflow2 convert qwen2_5_vl --from Qwen2.5-VL-3B-Instruct --to vlm_3b
starflow2 init --vlm vlm_3b --config starflow2_3b_t2i --out runs/3b
starflow2 train --config starflow2_3b_t2i --out runs/3b --config.data.source=captions.jsonl
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments.starflow2_7b_t2i import paper_size


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config of stage 1. `runlocal`: tiny networks, one step of each stage, digits as data."""
    return paper_size("3b", "text_to_image", runlocal)
