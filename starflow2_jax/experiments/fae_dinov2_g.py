"""The codec at the paper's size: the features of DINOv2-giant in 32 channels a token, and pictures of 256 pixels of
them.

    starflow2 train --config fae_dinov2_g --chip h100 --out runs/fae_g \\
        --config.encoder.path=dinov2-giant --config.data.source=pictures.jsonl

`encoder.path` is the folder of facebook/dinov2-giant; for dinov2-with-registers-giant, set encoder.registers=4 and
encoder.antialias=True. The directory of the run is a codec's folder at the end (docs/guides/codec.md). No run of this
size was made.

Sizes, steps, batches, beta's place, learning rate and the noise of `pixels` are the paper's (arXiv 2512.07829). The
paper does not give the weights of the losses: they are those of Apple's decoder training in the manner of TiTok, with a
distance in the frozen encoder's features in place of LPIPS, which would need VGG's file. With --chip, micro-batches are
chosen for 256 v5e, 64 v5p, 256 v6e or 8 GPUs. Only `features` and `pixels_tuned` on v5e have predicted plans
(docs/benchmarks/plans); the micro-batches on GPUs are estimates.
"""

from ml_collections import ConfigDict

from starflow2_jax.errors import ConfigError

# Chip -> micro-batches of the stages that make pictures, on 256 v5e, 64 v5p, 256 v6e, and 8 GPUs.
ACCUMULATE = {"v5e": 1, "v5p": 1, "v6e": 1, "h100": 4, "a100-80": 4, "h200": 2, "b200": 2}
GIANT = dict(kind="dinov2", layers=40, width=1536, heads=24, mlp_hidden=4096, grid=37, gated_mlp=True)
STEPS = dict(features=1_000_000, pixels=1_000_000, pixels_tuned=100_000)


def get_config(runlocal: bool = False, chip: str = "") -> ConfigDict:
    """The config. `runlocal`: tiny networks on scenes, the encoder included, two steps a stage. `chip`: a key of
    ACCUMULATE.

    Raises ConfigError.
    """
    c = ConfigDict(dict(kind="fae", mesh=dict(data=-1, fsdp=-1), order=tuple(STEPS), keep_every=50_000))
    c.data = dict(source="pictures.jsonl", workers=16, groups=64)
    c.faults = dict(nonfinite="skip")
    fast = dict(dtype="bfloat16", remat="full")
    c.encoder = dict(GIANT, path="dinov2-giant", **fast)
    c.networks = dict(fast)  # the defaults are the paper's sizes
    critic = dict(kind="patch", weight=0.1, train_from=20_000, use_from=20_000, lecam=0.001, optimizer=optimizer())
    losses = dict(l1=0.0, l2=1.0, perceptual=1.1, perceptual_layers=(10, 20, 30, 40))
    pixels = dict(rows=512, losses=losses, critic=critic)
    c.stages = dict(
        features=dict(rows=1024, beta=1e-6),
        pixels=dict(pixels, noise=0.4),
        pixels_tuned=dict(pixels, noise=0.3, noise_drawn=True),
    )
    for name, stage in c.stages.items():
        stage.update(steps=STEPS[name], optimizer=optimizer())
    if runlocal:
        return small(c)
    if chip and chip not in ACCUMULATE:
        raise ConfigError(
            f"this experiment has settings for the chips {', '.join(ACCUMULATE)}, not for {chip!r}; give one of these"
        )
    if chip:
        c.stages.pixels.accumulate = c.stages.pixels_tuned.accumulate = ACCUMULATE[chip]
    return c


def optimizer() -> dict:
    """AdamW, whose learning rate falls by a cosine to 0 [ours: the end is not published]."""
    return dict(learning_rate=1e-4, final_fraction=0.0, warmup=1000, b2=0.999, weight_decay=0.0)


def small(c: ConfigDict) -> ConfigDict:
    """`c` with two layers in each network, two steps of each stage, and scenes as data. The encoder is trained
    first.
    """
    tiny = dict(layers=2, heads=2, mlp_hidden=64)
    c.order = ("encoder", *c.order)
    c.data = dict(source="scenes")
    c.mesh, c.cpu_devices, c.measured = dict(data=-1, fsdp=1), 2, 2
    c.encoder.update(tiny, kind="vit", path="", width=32, grid=4, patch=14)
    c.networks.update(features=32, grid=(4, 4), channels=4, attention_heads=2, attention_head_dim=16)
    c.networks.feature_decoder = dict(tiny, head_dim=16)
    c.networks.pixel_decoder = dict(tiny, width=32, head_dim=16, patch=8)
    c.stages.encoder = dict(optimizer=optimizer())
    for stage in c.stages.values():
        stage.update(steps=2, rows=8)
    for name in ("pixels", "pixels_tuned"):
        c.stages[name].losses.perceptual_layers = (1, 2)
        c.stages[name].critic.update(channels=8, train_from=0, use_from=1)
    return c
