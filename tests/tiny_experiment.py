"""An experiment of the smallest size: experiments/digits_quick.py with a tiny model and rows."""

from ml_collections import ConfigDict

from starflow2_jax.config import loading as configs


def tiny_config(**changes) -> ConfigDict:
    c = configs.load("digits_quick", runlocal=True).unlock()
    c.codec.patch, c.model.grid, c.model.channels = 4, (2, 2), 16
    c.mesh = dict(data=8, fsdp=1, tensor=1)
    small = dict(layers=1, width=32, heads=2, unroll=1)
    c.model.vlm.update(small, kv_heads=1, head_dim=16, mlp_hidden=32, rotary_sections=(2, 3, 3))
    c.model.vlm.vision.update(small, mlp_hidden=32, out_width=32, patch=2, window=4)
    for flow in (c.model.shallow, c.model.deep):
        flow.update(small, mlp_hidden=32)
    c.model.shallow_blocks, c.model.deep_rotary_sections, c.model.adapter_hidden = 1, (2, 3, 3), 16
    for s in c.stages.values():
        s.update(rows=8, length=72, images=5, steps=4)
    c.stages.pretrain.patches = 80
    c.order, c.log_every, c.evals = ("pretrain", "joint"), 1, {}
    c.data.sources = {name: each for name, each in c.data.sources.items() if each.part == "train"}
    c.update(changes)
    return c


def drill_config(**changes) -> ConfigDict:
    """For processes that are killed: one stage, saved every few steps, four groups of rows."""
    c = tiny_config(cpu_devices=4, save_every=3, mesh=dict(data=-1, fsdp=2, sequence=1, tensor=1), order=("pretrain",))
    c.data.groups = 4
    c.stages.pretrain.steps = 14
    c.update(changes)
    return c


def get_config(runlocal: bool = False) -> ConfigDict:
    """What `starflow2 train --config` reads."""
    return drill_config()
