"""An experiment of the smallest size whose codec is an FAE folder, which `starflow2 init --codec` names."""

import tiny_fae
from ml_collections import ConfigDict
from tiny_experiment import tiny_config


def get_config(runlocal: bool = False) -> ConfigDict:
    """What `starflow2 init --config` reads."""
    c = tiny_config(order=("text_to_image", "joint"), cpu_devices=8)
    c.codec = dict(kind="fae", **tiny_fae.OPTIONS)
    c.model.grid, c.model.channels = tiny_fae.GRID, tiny_fae.CHANNELS
    for stage in c.stages.values():
        stage.images, stage.length, stage.steps = 4, 96, 1
    return c
