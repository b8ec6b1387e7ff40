"""A codec on one GPU: DINOv2-base and the pixel decoder of RAE stay as they are, and only the 32 channels between are
trained.

    starflow2 convert rae --from RAE-dinov2-wReg-base-ViTXL-n08 --to rae
    starflow2 train --config fae_dinov2_b --out runs/fae_b --config.start=rae --config.data.source=pictures.jsonl

The directory of the run is a codec's folder at the end (docs/guides/codec.md). --config.order=features,pixels_tuned
also tunes the decoder to features that were made of latents, with losses as in fae_dinov2_g. Steps and rows are this
project's choice, and no run of this size was made.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments import fae_dinov2_g

BASE = dict(kind="dinov2", layers=12, width=768, heads=12, mlp_hidden=3072, grid=37, registers=4, antialias=True)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RAE_DECODER = dict(
    width=1152,
    layers=28,
    heads=16,
    head_dim=72,
    mlp_hidden=4096,
    gated_mlp=False,
    norm_eps=1e-12,
    positions="sincos",
    class_token=True,
    **IMAGENET,
)


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: tiny networks on scenes, the encoder included, two steps a stage."""
    c = fae_dinov2_g.get_config(runlocal)
    c.mesh = dict(data=-1, fsdp=1)
    if runlocal:
        return c
    c.start, c.order, c.data.groups = "rae", ("features",), 1
    c.encoder = dict(BASE, dtype="bfloat16", remat="full")
    c.networks.update(features=768, attention_heads=12)
    c.networks.feature_decoder = dict(heads=12, mlp_hidden=2048)
    c.networks.pixel_decoder = dict(RAE_DECODER)
    c.stages.features.update(rows=256, steps=100_000)
    for name in ("pixels", "pixels_tuned"):
        c.stages[name].losses.perceptual_layers = (3, 6, 9, 12)
        c.stages[name].update(rows=64, accumulate=2, steps=50_000)
        c.stages[name].optimizer.learning_rate = 2e-5
    for stage in c.stages.values():
        stage.ema = 0.999
    return c
