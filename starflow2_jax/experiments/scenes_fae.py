"""`scenes_quick` on the latents of an FAE codec, in place of patches of pixels.

    starflow2 train --config fae_scenes --out runs/fae_scenes
    starflow2 train --config scenes_fae --out runs/scenes_fae --config.codec.path=runs/fae_scenes
    starflow2 eval --benchmark scenes_quick --checkpoint runs/scenes_fae --out runs/scenes_fae_report

Its scores beside those of patches are in docs/benchmarks/fae.md.
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
    return c
