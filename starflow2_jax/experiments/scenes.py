"""STARFlow2 on emoji scenes of 64 x 64 pixels with all 269 nouns, meant for one GPU; see docs/benchmarks/scenes.md.

    starflow2 train --config scenes --out runs/scenes
    starflow2 eval --benchmark scenes --checkpoint runs/scenes --out runs/scenes_report

It is scenes_quick with larger pictures, networks and rows, and with sprites of any side in any place. It is untried.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments import scenes_quick

FLOW = dict(width=512, heads=8, mlp_hidden=2048)


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: one layer in each network and four steps of each stage, to try the pipeline."""
    c = scenes_quick.get_config(runlocal)
    c.max_positions = 1024
    for source in c.data.sources.values():
        source.size, source.objects, source.quarters = 64, 0, False
    c.model.grid = (8, 8)
    c.model.vlm.vocabulary = 1024
    c.model.vlm.vision.update(patch=8, window=64, min_pixels=4096)
    for s in c.stages.values():
        s.length = 384  # a story of three pictures and their plans
    if runlocal:
        return c
    for flow in (c.model.shallow, c.model.deep):
        flow.update(FLOW)
    c.model.deep.layers = c.model.deep.unroll = 10
    c.model.vlm.update(width=256, heads=4, kv_heads=2, mlp_hidden=768, layers=4, unroll=4)
    c.model.vlm.vision.update(width=128, heads=4, mlp_hidden=256, out_width=256)
    for s in c.stages.values():
        s.rows = 32
    return c
