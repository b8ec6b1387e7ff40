"""STARFlow2 on emoji scenes of 32 x 32 pixels with 60 nouns, in patches of pixels, all stages on two CPU cores; see
docs/benchmarks/scenes.md. `scenes_fae` draws better, through a codec's latents.

    starflow2 train --config scenes_quick --out runs/scenes_quick
    starflow2 eval --benchmark scenes_quick --checkpoint runs/scenes_quick --out runs/scenes_quick_report

That page has its scores, and the reasons for embedding_std and least_std. Steps and shares are not tuned.
"""

from ml_collections import ConfigDict

from starflow2_jax.data.scenes.kinds import CAPTIONS, KINDS


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: one layer in each network and four steps of each stage, to try the pipeline."""
    c = ConfigDict()
    c.cpu_devices = 1  # whose matrix products take both cores
    c.noise = 0.1  # in pixels of [-1, 1]
    c.max_positions = 512
    c.log_every, c.save_every, c.keep = 10, 500, 2
    scenes = dict(path="scenes", size=32, objects=60, plan=True, quarters=True)
    c.data = dict(sources={kind: dict(scenes, kind=kind) for kind in KINDS})
    c.codec = dict(kind="patch", patch=8, image_channels=3, basis="cosine", least_std=0.5)

    flow = dict(width=192, heads=3, mlp_hidden=768, norm="rms_zero", activation="relu2", qk_norm="rms_zero")
    vision = dict(layers=2, unroll=2, width=64, heads=2, mlp_hidden=128, out_width=128, patch=4, window=32)
    vision |= dict(full_attention_layers=(), min_pixels=1024, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    vlm = dict(vocabulary=768, layers=3, unroll=3, width=128, heads=2, kv_heads=1, head_dim=64, mlp_hidden=384)
    vlm |= dict(rotary_sections=(8, 12, 12), rotary_theta=1e4, embedding_std=20.0)
    c.model = dict(
        grid=(4, 4),
        channels=192,
        shallow_blocks=2,
        shallow=dict(layers=1, unroll=1, **flow),
        deep=dict(layers=6, unroll=6, **flow),
        vlm=dict(vlm, vision=vision),
        adapter_hidden=256,
    )

    c.stages = dict(
        pretrain=stage(
            700,
            mix(1, position=3, description=2, question=4, edit=1, story=1, think=2),
            rate=1e-2,
            images=1,
            patches=512,
            rows=16,
        ),
        text_to_image=stage(1200, mix(1, colour=2, single=3, background=2, edit=2, story=1), images=5),
        image_to_text=stage(150, mix(0, description=1, question=1)),
        joint=stage(2900, mix(1, colour=2, position=2, description=1, question=4, edit=4, story=2, think=1)),
    )
    c.stages.text_to_image.optimizer.final_fraction = 0.5  # the joint stage goes on from there
    if runlocal:
        for stack in (c.model.deep, c.model.shallow, c.model.vlm, c.model.vlm.vision):
            stack.layers = stack.unroll = 1  # most of the time goes into compiling
        for s in c.stages.values():
            s.steps, s.optimizer.warmup = 4, 2
    return c


def mix(captions: float, **others: float) -> dict[str, float]:
    """The weights of the kinds of documents. captions: of each kind of caption. Kinds that are not given have none."""
    return dict.fromkeys(KINDS, 0.0) | dict.fromkeys(CAPTIONS, captions) | others


def stage(steps: int, shares: dict[str, float], rate: float = 3e-3, **changes: object) -> ConfigDict:
    """The config of a stage. shares: weights of the sources. rate: of learning. changes: other keys of the stage."""
    optimizer = dict(name="muon", learning_rate=rate, final_fraction=0.02, warmup=50, weight_decay=1e-2)
    common = dict(rows=8, length=160, ema=0.998, mix=shares, optimizer=optimizer)
    return ConfigDict(dict(steps=steps, **common) | changes)
