"""Verdicts on answers to tasks about scenes, from what the judge reads off their pictures and from their words."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.scenes.edits import changed
from starflow2_jax.data.scenes.kinds import CAPTIONS, Parts, Shown
from starflow2_jax.data.scenes.scene import UNITS, Placed, Scene, render
from starflow2_jax.data.scenes.words import Said, listed, name, parse, relation, some

NEAR = 3  # units by which a sprite may be away from where it should be
KEPT = 0.25  # largest root of the mean squared difference, of levels in [-1, 1], where an edit should change nothing
Read = Callable[[np.ndarray], Scene]  # the judge


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right. note: what the judge saw. parts: further numbers about the answer, by name."""

    right: bool
    note: str
    parts: dict[str, float] = field(default_factory=dict)


def judged(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """The verdict on an answer. kind: of the task, a key of KINDS. target: the whole document, of which the answer is
    the end.
    """
    return VERDICTS[kind](read, kind, target, answer)


def _caption(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """The picture shows the sprites of the caption and no others, and the ground or the relation where it names one."""
    [wanted], seen = scenes(target), [read(image) for image in pictures(answer)]
    pair = [placed.sprite for placed in wanted.placed]
    how = (pair[0], relation(wanted), pair[1]) if kind == "position" else None
    said = Said(wanted.counts, wanted.background if kind == "background" else "", how)
    return Verdict(len(seen) == 1 and said.holds(seen[0]), told(seen))


def _description(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """The caption is true of the scene, and names its ground and the relation of its two sprites."""
    [scene], said, wanted = scenes(target), parse(spoken(answer)), parse(spoken(target[-1:]))
    right = said is not None and wanted is not None and said.holds(scene)
    if said and wanted and right:
        right = bool(said.background) and (said.relation is None) == (wanted.relation is None)
    return Verdict(right, f"the picture shows {told([scene])}")


def _words(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """The answer has the same words."""
    wanted = spoken(target[-1:])
    return Verdict(spoken(answer) == wanted, f"wanted: {wanted}")


def _edit(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """The judge sees the scene after the edit, everything in its place, and the picture elsewhere is as it was."""
    (before, after), images = scenes(target), pictures(answer)
    if len(images) != 1:
        return Verdict(False, f"{len(images)} pictures", {"change": 0.0})
    found, error = read(images[0]), region_error(images[0], before, after)
    made = found.background == after.background and in_place(found, after.placed)
    return Verdict(made and error <= KEPT, told([found]), {"change": float(made), "region_error": error})


def _story(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """Each step has its words, and its picture is the one before it with the change.

    The first picture may have its sprites in any places on any ground; the later ones keep them.
    """
    wanted, seen = scenes(target), [read(image) for image in pictures(answer)]
    words = [spoken([part]) for part in target if isinstance(part, Text) and part.predict]
    said = [spoken([part]) for part in answer if isinstance(part, Text)]
    right = said == words and len(seen) == len(wanted) and seen[0].counts == wanted[0].counts
    if right:
        places = {(p.row, p.column): _of(seen[0], p)[0] for p in wanted[0].placed}
        background = seen[0].background
        for before, scene, found in zip(wanted, wanted[1:], seen[1:], strict=False):
            background = background if scene.background == before.background else scene.background
            expected = tuple(_put(places[p.row, p.column], p) for p in scene.placed)
            right &= found.background == background and in_place(found, expected)
    return Verdict(right, told(seen))


def _think(read: Read, kind: str, target: Parts, answer: Document) -> Verdict:
    """The words after the picture are right. Apart from that: whether the picture has everything in its corner."""
    [wanted], seen = scenes(target), [read(image) for image in pictures(answer)]
    corners = {(placed.sprite, placed.corner) for placed in wanted.placed}
    drawn = len(seen) == 1 and {(placed.sprite, placed.corner) for placed in seen[0].placed} == corners
    right = spoken(answer) == spoken(target[-1:])
    return Verdict(right, told(seen), {"picture": float(drawn)})


VERDICTS = dict.fromkeys(CAPTIONS, _caption) | {
    "description": _description,
    "question": _words,
    "edit": _edit,
    "story": _story,
    "think": _think,
}


def scenes(parts: Parts) -> list[Scene]:
    """The scenes of a document."""
    return [part.scene for part in parts if isinstance(part, Shown)]


def pictures(document: Document) -> list[np.ndarray]:
    """The pixels of a document's images."""
    return [part.pixels for part in document if isinstance(part, Image)]


def spoken(parts: Parts | Document) -> str:
    """All words of a document, with single spaces."""
    return " ".join(" ".join(part.text for part in parts if isinstance(part, Text)).split())


def told(seen: list[Scene]) -> str:
    """What the judge read, for people."""
    return "; ".join(_told(scene) for scene in seen) or "no picture"


def _told(scene: Scene) -> str:
    groups = [some(s, n) if n <= 4 else f"{n} times {name(s)}" for s, n in scene.counts.items()]
    return f"{listed(groups or ['nothing'])} on {scene.background or 'no background'}"


def in_place(found: Scene, wanted: tuple[Placed, ...]) -> bool:
    """Whether a scene has exactly these sprites, each at most NEAR units from its place in both directions."""
    left = list(found.placed)
    for placed in wanted:
        near = [p for p in left if p.sprite == placed.sprite and _distance(p, placed) <= NEAR]
        if not near:
            return False
        left.remove(min(near, key=lambda p: _distance(p, placed)))
    return not left


def region_error(picture: np.ndarray, before: Scene, after: Scene) -> float:
    """The root of the mean squared difference from the picture of `after`, outside the boxes of all changed sprites."""
    size = len(picture)
    kept, scale = np.ones((size, size), bool), size // UNITS
    for placed in changed(before, after):
        row, column, side = placed.row * scale, placed.column * scale, placed.side * scale
        kept[row : row + side, column : column + side] = False
    return float(np.sqrt(((picture - render(after, size))[kept] ** 2).mean()))


def _distance(a: Placed, b: Placed) -> float:
    return max(abs(x - y) for x, y in zip(a.centre, b.centre, strict=True))


def _of(scene: Scene, placed: Placed) -> list[Placed]:
    """Where a scene has this sprite."""
    return [each for each in scene.placed if each.sprite == placed.sprite]


def _put(place: Placed, placed: Placed) -> Placed:
    """The sprite of one in the place of the other."""
    return Placed(placed.sprite, place.row, place.column, place.side)
