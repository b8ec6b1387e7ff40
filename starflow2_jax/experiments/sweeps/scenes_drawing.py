"""Learning rate of the flow of scenes_quick, in 120 steps of text_to_image: three points.

Launch: starflow2 sweep --sweep scenes_drawing --out runs/sweeps/scenes_drawing
"""

from collections.abc import Iterator

from starflow2_jax.sweeps.points import grid

CONFIG = "scenes_quick"
METRIC = "text_to_image/image_loss"
ALWAYS = {
    "order": ("pretrain", "text_to_image"),
    "stages.pretrain.steps": 100,
    "stages.text_to_image.steps": 120,
}


def points() -> Iterator[dict]:
    """Three learning rates."""
    return grid({"stages.text_to_image.optimizer.learning_rate": (3e-3, 6e-3, 1.2e-2)})
