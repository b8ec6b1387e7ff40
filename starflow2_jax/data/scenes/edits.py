"""Edits of scenes: the words of an instruction, and the exact scene that results."""

from dataclasses import dataclass, replace

from starflow2_jax.data.scenes.art import Sprite
from starflow2_jax.data.scenes.scene import CORNERS, SIDES, UNITS, Placed, Scene
from starflow2_jax.data.scenes.words import some, the

WORDINGS = {
    "replace": ("replace {the_old} with {a_new}", "turn {the_old} into {a_new}"),
    "remove": ("remove {the_old}", "take {the_old} away"),
    "add": ("add {a_new} in the {corner} corner", "put {a_new} into the {corner} corner"),
    "swap": ("swap {the_old} and {the_new}", "let {the_old} and {the_new} change places"),
    "move": ("move {the_old} to the {corner} corner", "put {the_old} into the {corner} corner"),
    "recolour": ("make {the_old} {colour}", "change the colour of {the_old} to {colour}"),
    "tone": ("give the {noun} {tone} skin", "change the skin tone of the {noun} to {tone}"),
    "background": ("make the background {background}", "change the background to {background}"),
}
MARGIN = 1  # units between a corner's place and the picture's border


def in_corner(sprite: Sprite, corner: int) -> Placed:
    """The place that "in the upper left corner" (0), ... means: at the smallest side."""
    row, column = divmod(corner, 2)
    return Placed(sprite, MARGIN + row * UNITS // 2, MARGIN + column * UNITS // 2, SIDES[0])


@dataclass(frozen=True)
class Edit:
    """A change of a scene. kind: a key of WORDINGS, which needs some of the other fields."""

    kind: str
    old: Sprite | None = None
    new: Sprite | None = None
    corner: int = 0
    background: str = ""

    def words(self, wording: int) -> str:
        """The instruction, in one of its wordings."""
        old, new = self.old, self.new
        said = {"corner": CORNERS[self.corner], "background": self.background}
        if old:
            said |= {"the_old": the(old), "noun": old.noun}
        if new:
            said |= {"the_new": the(new), "a_new": some(new), "colour": new.colour, "tone": new.tone}
        return WORDINGS[self.kind][wording % len(WORDINGS[self.kind])].format(**said)

    def apply(self, scene: Scene) -> Scene | None:
        """The scene after the edit; None if the edit means nothing there."""
        if self.kind == "background":
            return replace(scene, background=self.background) if scene.background != self.background else None
        if self.kind in ("add", "move") and any(placed.corner == self.corner for placed in scene.placed):
            return None
        if self.kind == "add":
            return replace(scene, placed=(*scene.placed, in_corner(self.new, self.corner))) if self.new else None
        if self.old is None or scene.counts[self.old] != 1 or self.old == self.new:
            return None
        if self.kind == "swap" and (self.new is None or scene.counts[self.new] != 1):
            return None
        changed = (self._change(placed) for placed in scene.placed)
        return replace(scene, placed=tuple(placed for placed in changed if placed))

    def _change(self, placed: Placed) -> Placed | None:
        """What becomes of a sprite in its place; None: it is removed."""
        if self.kind == "swap" and placed.sprite == self.new and self.old:
            return replace(placed, sprite=self.old)
        if placed.sprite != self.old:
            return placed
        if self.kind == "remove":
            return None
        if self.kind == "move":
            return in_corner(placed.sprite, self.corner)
        return replace(placed, sprite=self.new) if self.new else None


def changed(before: Scene, after: Scene) -> set[Placed]:
    """The placed sprites that only one of the two scenes has."""
    return set(before.placed) ^ set(after.placed)
