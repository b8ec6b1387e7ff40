"""STARFlow2 on Qwen2.5-VL-3B, stage 2, the visual adapter: image -> words.

    starflow2 train --config starflow2_3b_adapter --out runs/3b --config.data.source=answers.jsonl

It continues in the directory of the stage before; see starflow2_3b_t2i.py.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments.starflow2_7b_t2i import paper_size


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config of stages 1 and 2. `runlocal`: tiny networks, one step of each stage, digits as data."""
    return paper_size("3b", "image_to_text", runlocal)
