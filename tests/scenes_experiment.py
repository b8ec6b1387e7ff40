"""A tiny experiment on scenes, and documents of theirs."""

from ml_collections import ConfigDict

from starflow2_jax.data.scenes.kinds import KINDS, Parts
from starflow2_jax.data.scenes.source import SceneOptions, Scenes
from starflow2_jax.experiments import scenes_quick


def edit(index: int) -> Parts:
    """An edit that adds, removes or moves nothing but one sprite."""
    source = Scenes(options=SceneOptions(kind="edit"))
    found = (source.parts(i) for i in range(200))
    alone = [parts for parts in found if "replace" in parts[1].text]
    return alone[index]


def get_config(runlocal: bool = False) -> ConfigDict:
    """What `starflow2 train --config` reads: 16 tokens a picture, one layer in each network."""
    c = scenes_quick.get_config(runlocal=True)
    c.codec.patch, c.model.grid, c.model.channels = 8, (4, 4), 192
    small = dict(layers=1, width=32, heads=2, unroll=1)
    c.model.vlm.update(small, kv_heads=1, head_dim=16, mlp_hidden=32, rotary_sections=(2, 3, 3))
    c.model.vlm.vision.update(small, mlp_hidden=32, out_width=32, patch=8)
    for flow in (c.model.shallow, c.model.deep):
        flow.update(small, mlp_hidden=32)
    c.model.shallow_blocks, c.model.deep_rotary_sections, c.model.adapter_hidden = 1, (2, 3, 3), 16
    c.order = ("pretrain", "joint")
    for name in c.order:
        c.stages[name].update(rows=8, length=192, steps=2)
        c.stages[name].mix = dict.fromkeys(KINDS, 1.0)
    c.cpu_devices, c.mesh = 8, dict(data=-1, fsdp=1, tensor=1)  # as many as the tests have
    return c
