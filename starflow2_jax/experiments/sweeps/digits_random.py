"""Learning rate, weight decay and dropout of digits_quick.py's text_to_image stage: twelve random points, compared by
their losses on held-out scans.

Launch: starflow2 sweep --sweep digits_random --out runs/sweeps/digits_random
"""

from collections.abc import Iterator

from starflow2_jax.sweeps.points import choice, log_uniform, random

CONFIG = "digits_quick"
ALWAYS = {"order": ("pretrain", "text_to_image")}
OPTIMIZER = "stages.text_to_image.optimizer"


def points() -> Iterator[dict]:
    """Twelve points, always the same ones."""
    draws = {
        f"{OPTIMIZER}.learning_rate": log_uniform(3e-4, 1e-2),
        f"{OPTIMIZER}.weight_decay": log_uniform(1e-3, 1.0),
        "model.deep.dropout": choice((0.0, 0.05, 0.1)),
    }
    return random(draws, 12, seed=0)
