"""A codec on emoji scenes of 32 x 32 pixels, its small encoder included, on two CPU cores.

    starflow2 train --config fae_scenes --out runs/fae_scenes

The directory is then a codec's folder, on which the experiment scenes_fae trains. Scenes that training does not see are
reconstructed and probed at the end of each stage (evals). docs/benchmarks/fae.md has its numbers, and those of a
variational autoencoder of the same size and cost, which no features shape:

    starflow2 train --config fae_scenes --out runs/vae_scenes --config.order=encoder,vae,pixels_tuned \\
        --config.stages.encoder.steps=0 --config.stages.pixels_tuned.losses.perceptual=0
"""

from ml_collections import ConfigDict

from starflow2_jax.data.scenes.kinds import CAPTIONS

WIDTH, GRID, PATCH = 256, 4, 8
OBJECT = r"\b(?:an?|some) (?!picture of )(.+)"  # of "a picture of a dog" and "draw some bread"
GROUND = r"on an? (\w+) background"


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: one layer in each network and two steps of each stage, to try the pipeline."""
    c = ConfigDict(dict(kind="fae", cpu_devices=1, log_every=10, save_every=500, keep=2, measured=50))
    c.order = ("encoder", "features", "pixels", "pixels_tuned")
    source = dict(path="scenes", size=32, objects=60, quarters=True)
    held_out = dict(validation="two", objects="single", grounds="background")
    c.data = dict(
        sources={kind: dict(source, kind=kind) for kind in CAPTIONS}
        | {name: dict(source, kind=kind, part="validation") for name, kind in held_out.items()}
    )
    c.evals = dict(
        reconstruction=dict(mix=dict(validation=1.0), batches=20),
        object=dict(kind="probe", mix=dict(objects=1.0), label=OBJECT),
        ground=dict(kind="probe", mix=dict(grounds=1.0), label=GROUND),
    )
    for each in c.evals.values():
        each.every = 0
    c.encoder = dict(kind="vit", layers=3, unroll=3, width=WIDTH, heads=4, mlp_hidden=1024, grid=GRID, patch=PATCH)
    heads = dict(heads=4, head_dim=64, mlp_hidden=768)
    c.networks = dict(
        features=WIDTH,
        grid=(GRID, GRID),
        channels=64,
        attention_heads=4,
        attention_head_dim=64,
        unroll=3,
        feature_decoder=dict(layers=2, **heads),
        pixel_decoder=dict(width=WIDTH, layers=3, patch=PATCH, **heads),
    )
    perceptual = dict(l1=1.0, perceptual=0.1, perceptual_layers=(1, 2, 3))
    critic = dict(
        kind="patch", channels=32, weight=0.1, train_from=100, use_from=200, lecam=0.001, optimizer=optimizer(2e-4)
    )
    c.stages = dict(
        encoder=stage(3000),
        features=stage(3000, beta=1e-6),
        pixels=stage(4000, noise=0.05, noise_drawn=True, losses=perceptual),
        pixels_tuned=stage(1000, noise=0.1, noise_drawn=True, losses=perceptual, critic=critic),
        vae=stage(7000, beta=1e-6, losses=dict(l1=1.0)),
    )

    if runlocal:
        for part in (c.encoder, c.networks.feature_decoder, c.networks.pixel_decoder):
            part.layers = 1
        c.encoder.unroll = c.networks.unroll = 1
        c.measured = 2
        for each in c.stages.values():
            each.steps, each.rows = 2, 8
        for each in c.evals.values():
            each.batches = 2
        for name in ("pixels", "pixels_tuned"):
            c.stages[name].losses.perceptual_layers = (1,)
        c.stages.pixels_tuned.critic.update(train_from=0, use_from=1)
    return c


def stage(steps: int, **changes: object) -> ConfigDict:
    """The config of a stage. changes: its keys that are not those of all stages."""
    return ConfigDict(dict(steps=steps, rows=32, ema=0.99, optimizer=optimizer(1e-3)) | changes)


def optimizer(rate: float) -> dict:
    """The optimizer with this learning rate."""
    return dict(learning_rate=rate, final_fraction=0.05, warmup=50, b2=0.99)
