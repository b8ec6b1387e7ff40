"""Emoji scenes through the latents of an FAE codec, all stages on two CPU cores: the networks of `scenes_quick`, which
has patches of pixels, with more steps of the joint stage.

    starflow2 train --config fae_scenes --out runs/fae_scenes
    starflow2 train --config scenes_fae --out runs/scenes_fae --config.codec.path=runs/fae_scenes
    starflow2 eval --benchmark scenes_quick --checkpoint runs/scenes_fae --out runs/scenes_fae_report

`starflow2 quickstart --demo scenes` does all three. The scores are in docs/benchmarks/scenes.md.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments import fae_scenes, scenes_quick


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: as that of scenes_quick."""
    c = scenes_quick.get_config(runlocal)
    networks = fae_scenes.get_config().networks
    c.codec = dict(kind="fae", grid=networks.grid, channels=networks.channels, patch=networks.pixel_decoder.patch)
    c.model.grid, c.model.channels = networks.grid, networks.channels
    c.noise = 0.3  # of latents with deviation 1
    c.stages.joint.mix.update(colour=1, question=6, edit=6, story=3)
    if not runlocal:
        for name, steps in dict(text_to_image=1000, image_to_text=50, joint=5000).items():
            c.stages[name].steps = steps
    return c
