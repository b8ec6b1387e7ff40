"""STARFlow2 on scikit-learn's digits: the longer recipe, meant for an hour on two CPU cores; see
docs/benchmarks/digits.md.

    starflow2 train --config digits --out runs/digits
    starflow2 eval --benchmark digits --checkpoint runs/digits --out runs/digits_report

It is digits_quick with more steps, more regularisation and warped scans.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments import digits_quick

STEPS = dict(pretrain=200, text_to_image=800, image_to_text=30, joint=3200)


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config. `runlocal`: the small version of digits_quick."""
    c = digits_quick.get_config(runlocal)
    if runlocal:
        return c
    for name, steps in STEPS.items():
        c.stages[name].update(steps=steps, ema=0.999)
        c.stages[name].optimizer.weight_decay = 0.1
    c.stages.joint.mix.caption = 7.0
    c.evals.val.every = 500
    for kind in digits_quick.KINDS:
        c.data.sources[kind].warp = 0.7  # each of the 1,500 scans is seen over a hundred times
    c.model.shallow.dropout = c.model.deep.dropout = 0.05
    return c
