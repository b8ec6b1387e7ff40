"""Scenes: what stands where on which ground. Pictures and words are made of a scene, and the judge reads one off a
picture.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np

from starflow2_jax.data.scenes.art import COLOURS, TONES, Sprite, drawn, nouns

UNITS = 32  # a picture's side in the units of a scene
SIDES = (14, 16, 20, 24)  # sides of sprites, in units
BACKGROUNDS = {
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
    "black": (28, 28, 28),
    "red": (196, 68, 68),
    "yellow": (250, 226, 120),
    "green": (104, 170, 96),
    "blue": (92, 144, 220),
    "pink": (246, 184, 206),
}
CONTRAST = 0.1  # least mean squared difference between a sprite and its ground, of three levels in [0, 1]
CORNERS = ("upper left", "upper right", "lower left", "lower right")
RELATIONS = ("to the left of", "to the right of", "above", "below")
APART = 6  # units between two centres, from which on a relation holds


@dataclass(frozen=True)
class Placed:
    """A sprite in its place, in units: its upper left corner, and its side."""

    sprite: Sprite
    row: int
    column: int
    side: int

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) in units."""
        return self.row + self.side / 2, self.column + self.side / 2

    @property
    def corner(self) -> int:
        """Number of the quarter that holds the centre, an index of CORNERS."""
        row, column = self.centre
        return 2 * (row >= UNITS / 2) + (column >= UNITS / 2)

    @property
    def quarter(self) -> "Placed":
        """The sprite filling the quarter that holds its centre."""
        half = UNITS // 2
        row, column = divmod(self.corner, 2)
        return Placed(self.sprite, row * half, column * half, half)


@dataclass(frozen=True)
class Scene:
    """A ground (a key of BACKGROUNDS; "" if a judge finds none) and the sprites on it."""

    background: str
    placed: tuple[Placed, ...]

    @property
    def counts(self) -> Counter[Sprite]:
        """How many of each sprite there are."""
        return Counter(placed.sprite for placed in self.placed)


def ground(background: str) -> np.ndarray:
    """The colour of a background: (3,) fp32 in [0, 1]."""
    return np.array(BACKGROUNDS[background], np.float32) / 255


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene: (size, size, 3) fp32 in [-1, 1], rounded to 8-bit levels. `size` is a multiple of
    UNITS.
    """
    picture, scale = np.tile(ground(scene.background), (size, size, 1)), size // UNITS
    for placed in scene.placed:
        row, column, side = placed.row * scale, placed.column * scale, placed.side * scale
        box = picture[row : row + side, column : column + side]
        sprite = drawn(placed.sprite, side)
        box *= 1 - sprite[..., 3:]
        box += sprite[..., :3]
    return np.clip(np.round(picture * 255), 0, 255) / np.float32(127.5) - 1


def in_quarters(scene: Scene) -> Scene:
    """The scene with each sprite filling the quarter of the picture that holds its centre."""
    return replace(scene, placed=tuple(placed.quarter for placed in scene.placed))


@cache
def stands_out(sprite: Sprite, background: str) -> bool:
    """Whether the sprite can be seen on the ground."""
    shown = drawn(sprite, SIDES[0])
    difference = shown[..., :3] - shown[..., 3:] * ground(background)
    return float((difference**2).sum() / shown[..., 3].sum()) > CONTRAST


def visible(scene: Scene) -> bool:
    """Whether every sprite stands out from the ground."""
    return all(stands_out(placed.sprite, scene.background) for placed in scene.placed)


def related(a: Placed, relation: str, b: Placed) -> bool:
    """Whether "a relation b" holds, such as "a above b"."""
    axis, sign = RELATIONS.index(relation) < 2, 1 if relation in ("to the left of", "above") else -1
    return sign * (b.centre[axis] - a.centre[axis]) >= APART


def held_out(scene: Scene) -> set[str]:
    """What the scene combines that training documents never combine: "pair", "colour", "tone", "count".

    Each sprite, noun, colour, tone and count does occur in training. A fifth of the pairs of sprites are held out, one
    colour or two of each coloured noun, one tone of each person, and one count of half of the nouns.
    """
    found = set()
    for sprite, count in scene.counts.items():
        number = nouns()[sprite.noun]
        if sprite.kind == "coloured" and sprite.colour in COLOURS[:9]:
            if (2 * number + COLOURS.index(sprite.colour)) % 5 == 0:
                found.add("colour")
        if sprite.kind == "person" and (number + TONES.index(sprite.tone)) % len(TONES) == 0:
            found.add("tone")
        if count > 1 and (number + count) % 6 == 0:
            found.add("count")
    if any((a.index + b.index) % 5 == 0 for a, b in combinations(scene.counts, 2)):
        found.add("pair")
    return found
