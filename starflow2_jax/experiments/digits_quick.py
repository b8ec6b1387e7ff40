"""STARFlow2 on scikit-learn's digits, all stages on two CPU cores: what the quickstart runs (see docs/benchmarks).

    starflow2 train --config digits_quick --out runs/digits_quick

`starflow2 config --config digits_quick` prints every key, also those that are not set here.
"""

from ml_collections import ConfigDict

KINDS = ("caption", "read", "sum", "mirror", "count")  # of documents


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: one layer in each network and four steps of each stage, to try the pipeline."""
    c = ConfigDict()
    c.cpu_devices = 2
    c.noise = 0.1  # in pixels of [-1, 1]
    c.max_positions = 256
    c.log_every, c.save_every, c.keep = 10, 500, 2
    sources = {kind: dict(path="digits", kind=kind) for kind in KINDS}
    held_out = {f"{kind}_held_out": dict(path="digits", kind=kind, part="held_out") for kind in KINDS}
    c.data = dict(sources=sources | held_out)
    c.codec = dict(kind="patch", patch=2, image_channels=1)

    flow = dict(width=128, heads=2, mlp_hidden=512, norm="rms_zero", activation="relu2", qk_norm="rms_zero")
    vision = dict(layers=2, unroll=2, width=64, heads=2, mlp_hidden=128, out_width=128, patch=2, window=8)
    vision |= dict(full_attention_layers=(), min_pixels=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    vlm = dict(vocabulary=416, layers=3, unroll=3, width=128, heads=2, kv_heads=1, head_dim=64, mlp_hidden=384)
    vlm |= dict(rotary_sections=(8, 12, 12), rotary_theta=1e4, embedding_std=1.0)
    c.model = dict(
        grid=(4, 4),
        channels=4,
        shallow_blocks=2,
        shallow=dict(layers=2, unroll=2, **flow),
        deep=dict(layers=6, unroll=6, **flow),
        vlm=dict(vlm, vision=vision),
        adapter_hidden=256,
    )

    c.stages = dict(
        pretrain=stage(130, (1.0, 1.0, 4.0, 0.5, 1.0), images=1, patches=160),
        text_to_image=stage(220, (3.0, 0.0, 0.0, 1.0, 0.0), images=6),
        image_to_text=stage(20, (0.0, 2.0, 1.0, 0.0, 0.0)),
        joint=stage(580, (5.0, 1.0, 3.0, 2.5, 1.5)),
    )
    val = dict(mix=dict.fromkeys(held_out, 1.0), every=300, batches=5, stages=("text_to_image", "joint"))
    c.evals = dict(val=val)
    c.stages.text_to_image.optimizer.final_fraction = 0.5  # the joint stage goes on from there
    if runlocal:
        for stack in (c.model.deep, c.model.shallow, c.model.vlm, c.model.vlm.vision):
            stack.layers = stack.unroll = 1  # most of the time goes into compiling
        for s in c.stages.values():
            s.steps, s.optimizer.warmup = 4, 2
    return c


def stage(steps: int, mix: tuple[float, ...], **changes: object) -> ConfigDict:
    """The config of a stage. `mix`: weights of KINDS. `changes`: other keys of the stage."""
    optimizer = dict(name="muon", learning_rate=2e-3, final_fraction=0.02, warmup=50, weight_decay=1e-2)
    common = dict(rows=16, length=128, ema=0.998, mix=dict(zip(KINDS, mix, strict=True)), optimizer=optimizer)
    return ConfigDict(dict(steps=steps, **common) | changes)
