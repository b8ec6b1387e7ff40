"""As fae_dinov2_b, with SigLIP2-base and the pixel decoder of its RAE; pictures of 256 pixels are not resized for it.

    starflow2 convert rae --from RAE-siglip2-base-p16-i256-ViTXL-n08 --to rae
    starflow2 train --config fae_siglip2_b --out runs/fae_siglip2 --config.start=rae --config.data.source=pictures.jsonl

For the encoder alone, from the folder of google/siglip2-base-patch16-256, set start to nothing, encoder.path to the
folder, and order to features,pixels,pixels_tuned. No run of this size was made.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments import fae_dinov2_b

SIZES = dict(layers=12, width=768, heads=12, mlp_hidden=3072, grid=16, patch=16)
FORM = dict(class_token=False, layer_scale=False, tanh_gelu=True)
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: tiny networks on scenes, the encoder included, two steps a stage."""
    c = fae_dinov2_b.get_config(runlocal)
    if runlocal:
        return c
    c.encoder = dict(kind="siglip", dtype="bfloat16", remat="full", **SIZES, **FORM, **HALF)
    c.networks.pixel_decoder.update(HALF)
    return c
