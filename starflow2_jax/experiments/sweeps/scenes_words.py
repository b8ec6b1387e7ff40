"""Learning rate of the vision-language model of scenes_quick, in 250 steps of pretrain: three points.

Launch: starflow2 sweep --sweep scenes_words --out runs/sweeps/scenes_words
"""

from collections.abc import Iterator

from starflow2_jax.sweeps.points import grid

CONFIG = "scenes_quick"
METRIC = "pretrain/text_loss"
ALWAYS = {"order": ("pretrain",), "stages.pretrain.steps": 250}


def points() -> Iterator[dict]:
    """Three learning rates."""
    return grid({"stages.pretrain.optimizer.learning_rate": (2e-3, 5e-3, 1.25e-2)})
