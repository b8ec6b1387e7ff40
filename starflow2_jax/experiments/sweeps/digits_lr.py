"""Learning rate and weight decay of a short text_to_image stage on digits: four points.

Launch: starflow2 sweep --sweep digits_lr --out runs/sweeps/digits_lr
"""

from collections.abc import Iterator

from starflow2_jax.sweeps.points import grid

CONFIG = "digits_quick"
METRIC = "text_to_image/image_loss"
ALWAYS = {
    "order": ("pretrain", "text_to_image"),
    "stages.pretrain.steps": 10,
    "stages.text_to_image.steps": 50,
    "stages.text_to_image.optimizer.warmup": 10,
}
OPTIMIZER = "stages.text_to_image.optimizer"


def points() -> Iterator[dict]:
    """Two learning rates, each with two weight decays."""
    return grid({f"{OPTIMIZER}.learning_rate": (5e-4, 5e-3), f"{OPTIMIZER}.weight_decay": (1e-3, 1e-1)})
