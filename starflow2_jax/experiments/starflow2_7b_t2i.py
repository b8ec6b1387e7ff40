"""STARFlow2 at the paper's size, stage 1: caption -> image, on Qwen2.5-VL-7B. The other starflow2_* files start from
here.

    starflow2 convert qwen2_5_vl --from Qwen2.5-VL-7B-Instruct --to vlm_7b
    starflow2 init --vlm vlm_7b --codec codec --config starflow2_7b_t2i --out runs/7b
    starflow2 train --config starflow2_7b_t2i --out runs/7b --config.data.source=captions.jsonl

The sizes are the paper's (arXiv 2605.08029); rows, steps and optimizer are not published and are this project's choice.
Pictures of 256 pixels become 16 x 16 tokens of 32 channels by the FAE codec in the folder `codec`
(docs/guides/codec.md). For latents of your own as .npy files, set codec.kind=latents. On TPUs or GPUs add --chip, such
as v5p or h100, which decides kernel, rows and remat as in the plans of docs/benchmarks/plans.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from starflow2_jax.errors import ConfigError
from starflow2_jax.experiments import digits_quick
from starflow2_jax.weights.qwen import QWEN2_5_VL

# Rows of a batch on 256 v5e, 64 v5p (128 cores), 256 v6e, 64 H100, and 8 of the other GPUs.
ROWS = {"v5e": 512, "v5p": 512, "v6e": 1024, "h100": 512, "a100-80": 32, "h200": 64, "b200": 64}
# GPU -> kernel of the streams whose rows hold several documents. An A100 has no packed cuDNN.
PACKED = {"a100-80": "triton"} | dict.fromkeys(("h100", "h200", "b200"), "cudnn_packed")
STEPS = dict(text_to_image=200_000, image_to_text=20_000, joint=100_000)


def get_config(runlocal: bool = False, chip: str = "") -> ConfigDict:
    """The config of stage 1. `runlocal`: tiny networks, one step of each stage, digits as data. `chip`: a key of
    ROWS.
    """
    return paper_size("7b", "text_to_image", runlocal, chip)


def paper_size(vlm: str, last: str, runlocal: bool, chip: str = "") -> ConfigDict:
    """The config of the stages up to `last`. A run skips those that its checkpoint directory has done already.

    `vlm`: the size of Qwen2.5-VL, a key of QWEN2_5_VL. `runlocal`, `chip`: see `get_config`. Raises ConfigError.
    """
    c = ConfigDict()
    c.mesh = dict(data=-1, fsdp=-1)
    c.order = tuple(STEPS)[: list(STEPS).index(last) + 1]
    c.data = dict(source="documents.jsonl", workers=16, groups=64)
    c.keep_every = 20_000
    c.faults = dict(nonfinite="skip", spike="skip")
    c.codec = dict(kind="fae", grid=(16, 16), channels=32, dtype="bfloat16")
    flow = dict(
        width=3072, heads=24, mlp_hidden=12288, norm="rms_zero", qk_norm="rms_zero", dtype="bfloat16", remat="full"
    )
    c.model = dict(grid=(16, 16), channels=32, shallow_blocks=2, adapter_hidden=4096, deep_rotary_sections=(16, 24, 24))
    c.model.shallow = dict(layers=4, **flow)
    c.model.deep = dict(layers=24, **flow)
    c.model.vlm = asdict(QWEN2_5_VL[vlm]) | dict(remat="full")
    c.stages = {name: dict(steps=steps, optimizer={}) for name, steps in STEPS.items()}
    c.stages.text_to_image.vlm_length = 512  # positions outside flow images
    c.stages.joint.optimizer.learning_rate = 5e-5
    if runlocal:
        return small(c)
    return on_slice(c, chip) if chip else c


def on_slice(c: ConfigDict, chip: str) -> ConfigDict:
    """`c` with settings that, by the predicted plans, fit on this kind of chip and are fast there. Raises
    ConfigError.
    """
    if chip not in ROWS:
        raise ConfigError(
            f"this experiment has settings for the chips {', '.join(ROWS)}, not for {chip!r}; give one of these"
        )
    for stage in c.stages.values():
        stage.rows = ROWS[chip]
    if chip == "v6e":
        c.stages.text_to_image.rows = 1536  # there is memory for them, and a step gathers all weights whatever its rows
    if chip in PACKED:
        c.data.groups = min(c.data.groups, ROWS[chip])
        c.model.vlm.kernel = c.model.deep.kernel = PACKED[chip]
        c.model.shallow.kernel = "cudnn"  # its rows are one image each
    else:
        c.model.vlm.kernel = c.model.shallow.kernel = c.model.deep.kernel = "splash"
    # There is memory for it:
    if c.order[-1] == "text_to_image" or (c.order[-1] == "joint" and chip in ("v5p", "v6e", *PACKED)):
        c.model.shallow.remat = c.model.deep.remat = "dots"
    return c


def small(c: ConfigDict) -> ConfigDict:
    """`c` with two layers in each network, one step of each stage, and digits as data."""
    tiny, quick = dict(layers=2, width=32, heads=2), digits_quick.get_config()
    c.order = ("pretrain", *c.order)
    c.data, c.codec = quick.data, quick.codec
    c.model.update(grid=(4, 4), channels=4, adapter_hidden=32, deep_rotary_sections=(2, 3, 3))
    c.model.vlm.update(tiny, vocabulary=416, kv_heads=1, head_dim=16, mlp_hidden=48, rotary_sections=(2, 3, 3))
    c.model.vlm.vision.update(tiny, mlp_hidden=48, out_width=32, patch=2, window=4, min_pixels=64)
    c.model.vlm.vision.full_attention_layers = (1,)
    for flow in (c.model.shallow, c.model.deep):
        flow.update(tiny, mlp_hidden=64)
    c.stages.pretrain = dict(patches=96, mix=dict(caption=1.0, read=1.0))
    c.stages.text_to_image.update(vlm_length=40, mix=dict(caption=1.0))
    c.stages.image_to_text.mix = dict(read=1.0)
    c.stages.joint.mix = dict(caption=1.0, read=1.0, mirror=1.0)
    for stage in c.stages.values():
        stage.update(rows=8, length=64, images=4, steps=1)
    return c
