"""A codec of the smallest size, trained in the four stages of FAE, two steps each; `vae` can take their place."""

OPTIMIZER = dict(learning_rate=1e-2, warmup=1)
CRITIC = dict(kind="patch", channels=4, stages=2, weight=0.5, lecam=0.01, use_from=1, optimizer=OPTIMIZER)
DECODER = dict(width=16, layers=1, heads=2, head_dim=8, mlp_hidden=16, patch=8)


def config(**changes: object) -> dict:
    losses = dict(l1=1.0, l2=0.5, perceptual=0.2, perceptual_layers=(1, 2))
    common = dict(steps=2, rows=8, ema=0.9, optimizer=OPTIMIZER)
    return (
        dict(
            kind="fae",
            data=dict(sources=dict(scenes=dict(path="scenes", size=32, crop="random", flip=True)), groups=2),
            order=("encoder", "features", "pixels", "pixels_tuned"),
            encoder=dict(kind="vit", layers=2, width=16, heads=2, mlp_hidden=16, grid=4, patch=4),
            networks=dict(
                features=16,
                grid=(4, 4),
                channels=4,
                attention_heads=2,
                attention_head_dim=8,
                feature_decoder=dict(layers=1, heads=2, head_dim=8, mlp_hidden=16),
                pixel_decoder=DECODER,
            ),
            stages=dict(
                encoder=common,
                features=dict(common, beta=1e-2),
                pixels=dict(common, noise=0.3, noise_drawn=True, losses=losses, critic=CRITIC),
                pixels_tuned=dict(
                    common, noise=0.1, losses=losses, critic=dict(CRITIC, kind="features", layers=(1, 2))
                ),
                vae=dict(common, beta=1e-2, losses=losses, critic=CRITIC),
            ),
            measured=2,
            log_every=1,
            save_every=1,
        )
        | changes
    )
