"""The kinds of documents: each draws scenes, and makes words and pictures of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from starflow2_jax.data.documents import Text
from starflow2_jax.data.scenes import words
from starflow2_jax.data.scenes.art import Sprite, vocabulary
from starflow2_jax.data.scenes.edits import Edit, in_corner
from starflow2_jax.data.scenes.scene import BACKGROUNDS, CORNERS, RELATIONS, SIDES, UNITS, Placed, Scene
from starflow2_jax.data.scenes.words import describe, name, on, relation, some, the, verb

FRAMES = ("{what}", "a picture of {what}", "draw {what}", "show {what}", "please draw {what}")
DESCRIBE = ("describe the picture", "what does the picture show?", "say what is in the picture")
STORY = ("tell a story: {steps}", "draw step by step: {steps}", "{steps}")
EDITS = ("replace", "remove", "add", "swap", "move", "recolour", "tone", "background")
STORY_EDITS = ("replace", "remove", "swap", "recolour", "background")
NOTHING = "nothing"
HALF = UNITS // 2
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Shown:
    """A picture of a scene as a part of a document."""

    scene: Scene
    generate: bool = False


Parts = list[Text | Shown]


class Draw:
    """Random draws of sprites and scenes. `objects`: nouns of the vocabulary, 0 for all. `in_line`: pairs stand in
    line.
    """

    def __init__(self, rng: np.random.Generator, objects: int, in_line: bool = False):
        self.rng, self.all, self.off_line = rng, vocabulary(objects), 0 if in_line else 1
        self.objects, self.coloured, self.people = (
            [sprite for sprite in self.all if sprite.kind == kind] for kind in ("object", "coloured", "person")
        )
        self.wording = int(rng.integers(1000))

    def pick(self, choices: Sequence[Choice]) -> Choice:
        """One of several."""
        return choices[int(self.rng.integers(len(choices)))]

    def several(self, choices: Sequence[Sprite], count: int) -> list[Sprite]:
        """Different sprites."""
        return [choices[i] for i in self.rng.choice(len(choices), count, replace=False)]

    def background(self) -> str:
        """The name of a ground."""
        return self.pick(list(BACKGROUNDS))

    def one(self, sprite: Sprite) -> Scene:
        """The sprite alone, large, anywhere."""
        side = self.pick(SIDES[2:])
        row, column = (int(x) for x in self.rng.integers(0, UNITS - side, 2, endpoint=True))
        return Scene(self.background(), (Placed(sprite, row, column, side),))

    def pair(self, sprites: Sequence[Sprite]) -> Scene:
        """Two sprites beside or above each other, in any order, so that exactly one relation of RELATIONS holds."""
        side, across = self.pick(SIDES[:2]), self.rng.integers(2)
        shared = int(self.rng.integers(1, UNITS - side - 1, endpoint=True))
        placed = []
        for half, sprite in enumerate(sprites):
            along = half * HALF + int(self.rng.integers(0, HALF - side, endpoint=True))
            beside = shared + int(self.rng.integers(-self.off_line, self.off_line, endpoint=True))
            row, column = (beside, along) if across else (along, beside)
            placed.append(Placed(sprite, row, column, side))
        return Scene(self.background(), tuple(placed if self.rng.integers(2) else placed[::-1]))

    def quarters(self, sprites: Sequence[Sprite]) -> Scene:
        """Up to four small sprites, each in a quarter of the picture."""
        placed = []
        for sprite, corner in zip(sprites, self.rng.permutation(4), strict=False):
            row, column = (int(x) for x in self.rng.integers(0, HALF - SIDES[0], 2, endpoint=True))
            at = in_corner(sprite, int(corner))
            placed.append(replace(at, row=at.row // HALF * HALF + row, column=at.column // HALF * HALF + column))
        return Scene(self.background(), tuple(placed))

    def many(self, sprite: Sprite, count: int) -> Scene:
        """One to four of a sprite."""
        if count == 1:
            return self.one(sprite)
        return self.pair([sprite] * 2) if count == 2 else self.quarters([sprite] * count)

    def countable(self) -> Sprite:
        """An object that can be counted."""
        return self.pick([sprite for sprite in self.objects if words.countable(sprite)])

    def two_coloured(self) -> list[Sprite]:
        """Coloured sprites of two nouns."""
        while True:
            a, b = self.several(self.coloured, 2)
            if a.noun != b.noun:
                return [a, b]

    def text(self, wordings: Sequence[str], **said: str) -> str:
        """One of the wordings, filled in."""
        return wordings[self.wording % len(wordings)].format(**said)

    def edit(self, scene: Scene, kind: str) -> Edit:
        """An edit of this kind. It may mean nothing in this scene; then `apply` gives None."""
        old = self.pick(scene.placed).sprite
        same = [s for s in self.all if s.noun == old.noun and s != old]
        if kind == "swap":
            return Edit(kind, old, scene.placed[-1].sprite)
        if kind in ("recolour", "tone"):
            fits = same and old.kind == ("coloured" if kind == "recolour" else "person")
            return Edit(kind, old, self.pick(same)) if fits else Edit(kind)
        new = self.pick(self.objects) if kind in ("replace", "add") else None
        return Edit(kind, old, new, int(self.rng.integers(4)), self.background())


def caption(d: Draw, what: str, scene: Scene) -> Parts:
    """A caption, then its picture to draw."""
    return [Text(d.text(FRAMES, what=what)), Shown(scene, generate=True)]


def single(d: Draw) -> Parts:
    """ "a dog"."""
    sprite = d.pick(d.objects)
    return caption(d, some(sprite), d.one(sprite))


def two(d: Draw) -> Parts:
    """ "a dog and a cat"."""
    sprites = d.several(d.objects, 2)
    return caption(d, words.listed([some(sprite) for sprite in sprites]), d.pair(sprites))


def counting(d: Draw) -> Parts:
    """ "three dogs"."""
    sprite, count = d.countable(), int(d.rng.integers(1, 5))
    return caption(d, f"{words.NUMBERS[count - 1]} {name(sprite, count)}", d.many(sprite, count))


def colour(d: Draw) -> Parts:
    """ "a red heart"."""
    sprite = d.pick(d.coloured)
    return caption(d, some(sprite), d.one(sprite))


def position(d: Draw) -> Parts:
    """ "a dog above a cat"."""
    scene = d.pair(d.several(d.objects, 2))
    return caption(d, f" {relation(scene)} ".join(some(placed.sprite) for placed in scene.placed), scene)


def attribution(d: Draw) -> Parts:
    """ "a red heart and a blue circle"."""
    sprites = d.two_coloured()
    return caption(d, words.listed([some(sprite) for sprite in sprites]), d.pair(sprites))


def tone(d: Draw) -> Parts:
    """ "a cook with dark skin"."""
    sprite = d.pick(d.people)
    return caption(d, some(sprite), d.one(sprite))


def background(d: Draw) -> Parts:
    """ "a dog on a blue background"."""
    sprite = d.pick(d.objects)
    scene = d.one(sprite)
    return caption(d, f"{some(sprite)} {on(scene.background)}", scene)


CAPTIONS: dict[str, Callable[[Draw], Parts]] = {
    each.__name__: each for each in (single, two, counting, colour, position, attribution, tone, background)
}


def _scene(d: Draw, kind: str) -> Scene:
    """The scene of a caption of this kind."""
    return next(part.scene for part in CAPTIONS[kind](d) if isinstance(part, Shown))


def description(d: Draw) -> Parts:
    """A picture, then its caption to write."""
    scene = _scene(d, d.pick(list(CAPTIONS)))
    return [Shown(scene), Text(d.text(DESCRIBE)), Text(f" {describe(scene)}", predict=True)]


def question(d: Draw) -> Parts:
    """A picture, a question, and its answer to write."""
    scene, asked, answer = QUESTIONS[d.pick(list(QUESTIONS))](d)
    return [Shown(scene), Text(asked), Text(f" {answer}", predict=True)]


Asked = tuple[Scene, str, str]  # scene, question, answer


def _what(d: Draw) -> Asked:
    sprite = d.pick(d.all)
    return d.one(sprite), d.text(("what is this?", "what is in the picture?")), some(sprite)


def _where(d: Draw) -> Asked:
    scene = _scene(d, "two")
    a, b = (placed.sprite for placed in scene.placed)
    return scene, f"where {verb(a)} {the(a)}?", f"{relation(scene)} {the(b)}"


def _how_many(d: Draw) -> Asked:
    sprite, count = d.countable(), int(d.rng.integers(1, 5))
    wordings = ("how many {many} are there?", "how many {many} do you see?")
    return d.many(sprite, count), d.text(wordings, many=name(sprite, 2)), words.NUMBERS[count - 1]


def _which_colour(d: Draw) -> Asked:
    scene = _scene(d, "attribution")
    sprite = scene.placed[0].sprite
    return scene, d.text(("which colour is the {n}?", "what colour does the {n} have?"), n=sprite.noun), sprite.colour


def _which_tone(d: Draw) -> Asked:
    sprite = d.pick(d.people)
    do = "do" if verb(sprite) == "are" else "does"
    return d.one(sprite), f"which skin tone {do} the {sprite.noun} have?", sprite.tone


def _which_background(d: Draw) -> Asked:
    scene = _scene(d, d.pick(list(CAPTIONS)))
    return scene, d.text(("which colour is the background?", "what colour is behind it?")), scene.background


def _whether_there(d: Draw) -> Asked:
    a, b, other = d.several(d.objects, 3)
    sprite, yes = d.pick(((a, True), (other, False)))
    return d.pair([a, b]), f"{verb(sprite)} there {some(sprite)}?", "yes" if yes else "no"


def _whether_placed(d: Draw) -> Asked:
    scene = _scene(d, "two")
    a, b = (placed.sprite for placed in scene.placed)
    true = relation(scene)
    said = true if d.rng.integers(2) else d.pick([each for each in RELATIONS if each != true])
    return scene, f"{verb(a)} {the(a)} {said} {the(b)}?", "yes" if said == true else "no"


QUESTIONS: dict[str, Callable[[Draw], Asked]] = {
    "what": _what,
    "where": _where,
    "how many": _how_many,
    "which colour": _which_colour,
    "which tone": _which_tone,
    "which background": _which_background,
    "whether there": _whether_there,
    "whether placed": _whether_placed,
}


def edited(d: Draw, kind: str) -> tuple[Scene, Edit, Scene]:
    """A scene, an edit of this kind, and the scene after it."""
    while True:
        if kind == "tone":
            scene = d.one(d.pick(d.people))
        else:
            scene = d.quarters(d.several(d.objects + d.coloured, int(d.rng.integers(1, 4))))
        edit = d.edit(scene, kind)
        if (after := edit.apply(scene)) and after.placed:
            return scene, edit, after


def edit(d: Draw) -> Parts:
    """A picture, an instruction, and the changed picture to draw."""
    before, change, after = edited(d, d.pick(EDITS))
    return [Shown(before), Text(change.words(d.wording)), Shown(after, generate=True)]


def story(d: Draw) -> Parts:
    """A caption and one or two edits, then the words and the picture of each step to write and draw."""
    scene = d.quarters(d.several(d.objects + d.coloured, int(d.rng.integers(1, 3))))
    steps, scenes = [words.listed([some(placed.sprite) for placed in scene.placed])], [scene]
    length = int(d.rng.integers(2, 4))
    while len(scenes) < length:
        change = d.edit(scenes[-1], d.pick(STORY_EDITS))
        if (after := change.apply(scenes[-1])) and after.placed:
            steps.append(change.words(d.wording))
            scenes.append(after)
    parts: Parts = [Text(d.text(STORY, steps=", then ".join(steps)))]
    for step, each in zip(steps, scenes, strict=True):
        parts += [Text(f" {step}", predict=True), Shown(each, generate=True)]
    return parts


def think(d: Draw) -> Parts:
    """A puzzle of positions, a picture to draw, and the answer that can be read off the picture."""
    a, b, c = d.several(d.objects, 3)
    start, sideways = int(d.rng.integers(4)), bool(d.rng.integers(2))
    path = [start, start ^ (1 if sideways else 2), start ^ 3]  # corners that differ in bit 0 are beside each other
    placed = [in_corner(sprite, corner) for sprite, corner in zip((a, b, c), path, strict=True)]
    scene = Scene(d.background(), tuple(placed))
    there, then, last = (
        f"there {verb(a)} {some(a)} in the {CORNERS[start]} corner",
        f"{some(b)} {verb(b)} {relation(replace(scene, placed=(placed[1], placed[0])))} {the(a)}",
        f"{some(c)} {verb(c)} {relation(replace(scene, placed=(placed[2], placed[1])))} {the(b)}",
    )
    asked = d.pick((path[2], path[2], int(d.rng.integers(4))))
    answer = next((some(each.sprite) for each in placed if each.corner == asked), NOTHING)
    puzzle = f"{there}. {then}. {last}. what is in the {CORNERS[asked]} corner?"
    return [Text(puzzle), Shown(scene, generate=True), Text(f" {answer}", predict=True)]


KINDS: dict[str, Callable[[Draw], Parts]] = CAPTIONS | {
    each.__name__: each for each in (description, question, edit, story, think)
}
