"""The judge of scenes: it reads a scene off a picture by comparing every place with every sprite at every size.

It knows the vocabulary and the grounds, and nothing of what the picture should show.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from starflow2_jax.data.scenes.art import drawn, vocabulary
from starflow2_jax.data.scenes.scene import BACKGROUNDS, SIDES, UNITS, Placed, Scene, ground, stands_out

NEAR = 0.25  # distance of a pixel from the colour of a ground, of levels in [0, 1], up to which it is of that ground
LEAST = 0.15  # share of a picture's pixels that its ground has
THRESHOLD = 0.4  # largest squared error of a found sprite, as a share of its squared difference from the ground
CHI2 = 2.366  # median of the sum of three squared standard normal numbers
Found = tuple[float, float, Placed]  # squared error that a sprite explains, and that it leaves as a share; its place
OVERLAP = 0.15  # share of the smaller of two boxes up to which found sprites may overlap


class Judge:
    """Reads scenes. objects: nouns of the vocabulary, 0 for all."""

    def __init__(self, objects: int = 0):
        self.objects = objects

    def __call__(self, picture: np.ndarray) -> Scene:
        """The scene in a picture (size, size, 3) in [-1, 1], `size` a multiple of UNITS. No ground, no sprites:
        noise.
        """
        levels = np.clip((small(picture) + 1) / 2, 0, 1)
        readings = [self._sprites(name, *_without(levels, pixels)) for name, pixels in _grounds(levels).items()]
        return min(readings, key=lambda reading: reading[0])[1] if readings else Scene("", ())

    def _sprites(self, background: str, difference: np.ndarray, noise: float) -> tuple[float, Scene]:
        """The scene in a picture (UNITS, UNITS, 3) less its ground, and the squared error that the scene leaves.

        noise: variance of a level.
        """
        found: list[Found] = []
        for side in SIDES:
            sprites, templates = _templates(self.objects, background, side)
            windows = np.lib.stride_tricks.sliding_window_view(difference, (side, side), (0, 1))
            windows = windows.reshape(-1, 3 * side * side)
            squares = (templates**2).sum(1)
            explained = 2 * windows @ templates.T - squares  # what the squared error falls by: places, sprites
            best = explained.argmax(1)
            gain = explained[np.arange(len(best)), best]
            error = ((windows**2).sum(1) - gain - windows.shape[1] * noise) / squares[best]
            for place in np.flatnonzero(error < THRESHOLD):
                row, column = divmod(int(place), UNITS - side + 1)
                found.append((float(gain[place]), float(error[place]), Placed(sprites[best[place]], row, column, side)))
        # Two sprites together can look like one large one, and a part of a large one like a small one: both orders are
        # tried, those that explain most first and those that fit best first.
        choices = [_apart(found, order) for order in (lambda each: -each[0], lambda each: each[1])]
        explained, kept = max(((sum(gain for gain, _, _ in chosen), chosen) for chosen in choices), key=lambda x: x[0])
        return float((difference**2).sum()) - explained, Scene(background, tuple(placed for _, _, placed in kept))


def _apart(found: list[Found], order: Callable[[Found], float]) -> list[Found]:
    """Of these sprites, in this order, those that overlap none before them."""
    kept: list[Found] = []
    for each in sorted(found, key=order):
        if all(_overlap(each[2], other[2]) <= OVERLAP for other in kept):
            kept.append(each)
    return kept


def small(picture: np.ndarray) -> np.ndarray:
    """A picture (size, size, C) -> (UNITS, UNITS, C): the means of its squares of pixels."""
    scale = len(picture) // UNITS
    return picture.reshape(UNITS, scale, UNITS, scale, -1).mean((1, 3))


def _grounds(levels: np.ndarray) -> dict[str, np.ndarray]:
    """The grounds that a picture in [0, 1] may have, and their pixels (UNITS, UNITS) bool; several if a sprite is
    large.
    """
    distances = np.stack([np.linalg.norm(levels - ground(name), axis=-1) for name in BACKGROUNDS])
    nearest = np.where(distances.min(0) < NEAR, distances.argmin(0), -1)
    pixels = {name: nearest == i for i, name in enumerate(BACKGROUNDS)}
    return {name: own for name, own in pixels.items() if own.mean() >= LEAST}


def _without(levels: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """A picture less the median of its ground, which bears drift, and the variance of a level on the ground."""
    difference = levels - np.median(levels[pixels], axis=0)
    return difference, float(np.median((difference[pixels] ** 2).sum(-1))) / CHI2


@cache
def _templates(objects: int, background: str, side: int) -> tuple[list, np.ndarray]:
    """The sprites that stand out from a ground, and their differences from it: (sprites, 3 * side * side) fp32."""
    sprites = [sprite for sprite in vocabulary(objects) if stands_out(sprite, background)]
    shown = np.stack([drawn(sprite, side) for sprite in sprites])
    differences = shown[..., :3] - shown[..., 3:] * ground(background)
    return sprites, differences.transpose(0, 3, 1, 2).reshape(len(sprites), -1)


def _overlap(a: Placed, b: Placed) -> float:
    """The common area of two boxes, as a share of the smaller one."""
    rows = min(a.row + a.side, b.row + b.side) - max(a.row, b.row)
    columns = min(a.column + a.side, b.column + b.side) - max(a.column, b.column)
    return max(rows, 0) * max(columns, 0) / min(a.side, b.side) ** 2
