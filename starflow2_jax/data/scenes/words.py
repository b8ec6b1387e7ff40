"""The grammar: sentences about scenes, with articles, plurals and verbs; and a parser of captions."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from starflow2_jax.data.scenes.art import Sprite, sprites
from starflow2_jax.data.scenes.scene import BACKGROUNDS, CORNERS, RELATIONS, Placed, Scene, related

NUMBERS = ("one", "two", "three", "four")
MASS = {"bread", "popcorn", "sushi", "garlic", "broccoli", "DNA"}
PLURAL = {"grapes", "cherries", "peanuts", "pancakes", "jeans", "scissors", "clapping hands", "folded hands"}
IRREGULAR = {
    "wolf": "wolves",
    "mouse": "mice",
    "fish": "fish",
    "bison": "bison",
    "die": "dice",
    "mango": "mangoes",
    "tomato": "tomatoes",
    "tornado": "tornadoes",
    "volcano": "volcanoes",
    "snowman": "snowmen",
}
AN = ("hourglass",)
NOT_AN = ("unicorn",)


def article(words: str) -> str:
    """ "a" or "an", by the first word's sound."""
    first = words.split()[0]
    return "an" if first in AN or (first[0] in "aeiouAEIOU" and first not in NOT_AN) else "a"


def plural(noun: str) -> str:
    """The plural of a noun of one or several words."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    head, of, rest = noun.partition(" of ")
    if of:
        return plural(head) + of + rest
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def countable(sprite: Sprite) -> bool:
    """Whether the sprite's noun has a singular and a plural."""
    return sprite.noun not in MASS | PLURAL


def name(sprite: Sprite, count: int = 1) -> str:
    """The sprite's name without an article: "red heart", "dogs", "cook with dark skin"."""
    noun = sprite.noun if count == 1 else plural(sprite.noun)
    return f"{sprite.colour} {noun}".lstrip() + (f" with {sprite.tone} skin" if sprite.tone else "")


def some(sprite: Sprite, count: int = 1) -> str:
    """ "a dog", "some bread", "two red hearts"."""
    if count > 1:
        return f"{NUMBERS[count - 1]} {name(sprite, count)}"
    return f"{article(name(sprite)) if countable(sprite) else 'some'} {name(sprite)}"


def the(sprite: Sprite) -> str:
    """ "the dog"."""
    return f"the {name(sprite)}"


def verb(sprite: Sprite) -> str:
    """ "is", or "are" for a noun in the plural."""
    return "are" if sprite.noun in PLURAL else "is"


def listed(phrases: list[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    *most, last = phrases
    return f"{', '.join(most)} and {last}" if most else last


def on(background: str) -> str:
    """ "on a blue background"."""
    return f"on {article(background)} {background} background"


def relation(scene: Scene) -> str:
    """The relation of the first of two sprites to the second."""
    a, b = scene.placed
    return next(each for each in RELATIONS if related(a, each, b))


def describe(scene: Scene) -> str:
    """All that captions tell of a scene: its sprites, the relation of two different ones, and its ground."""
    groups = [some(sprite, count) for sprite, count in scene.counts.items()]
    two = len(groups) == len(scene.placed) == 2
    said = f" {relation(scene)} ".join(groups) if two else listed(groups)
    return f"{said} {on(scene.background)}"


@dataclass(frozen=True)
class Said:
    """What a caption says. background: "" if it names none. relation: (a, relation, b), or None."""

    counts: Counter[Sprite] = field(default_factory=Counter)
    background: str = ""
    relation: tuple[Sprite, str, Sprite] | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the scene has what the caption says and no other sprites."""
        if self.counts != scene.counts or self.background not in ("", scene.background):
            return False
        if self.relation is None:
            return True
        a, how, b = self.relation
        first, second = ([p for p in scene.placed if p.sprite == sprite] for sprite in (a, b))
        return any(related(x, how, y) for x in first for y in second)


@cache
def _phrases() -> dict[str, tuple[Sprite, int]]:
    """Every phrase that names sprites and their number."""
    found = {some(sprite): (sprite, 1) for sprite in sprites()}
    for sprite in filter(countable, sprites()):
        found |= {f"{number} {name(sprite, n)}": (sprite, n) for n, number in enumerate(NUMBERS, 1)}
    return found


def parse(caption: str) -> Said | None:
    """What a caption says, whoever wrote it; None if it is not of this grammar."""
    said, mark, last = caption.strip().rpartition(" on a ")
    background = last.removesuffix(" background")
    if not mark or background not in BACKGROUNDS or background == last:
        said, background = caption.strip(), ""
    how = next((each for each in RELATIONS if f" {each} " in said), None)
    named = said.split(f" {how} ") if how else said.replace(" and ", ", ").split(", ")
    groups = [_phrases().get(each) for each in named]
    if not all(groups) or (how and (len(groups) != 2 or groups[0] == groups[1])):
        return None
    counts: Counter[Sprite] = Counter()
    for sprite, count in filter(None, groups):
        counts[sprite] += count
    a, b = (groups[0], groups[-1])
    return Said(counts, background, (a[0], how, b[0]) if how and a and b else None)


def plan(scene: Scene) -> str:
    """What stands where on which ground, row by row: "on blue: upper left dog, lower right red: heart" in quarters,
    otherwise "on blue: 20 at 4 8 dog", side, row and column in units.

    The place comes first, so that a causal model knows it when it reads or writes the name. A colour is no neighbour of
    its noun, so that a small model copies both from its prompt, also where it never saw them together.
    """
    placed = sorted(scene.placed, key=lambda each: (each.row, each.column))
    return f"on {scene.background}: " + ", ".join(f"{_place(each)} {_thing(each.sprite)}" for each in placed)


def _thing(sprite: Sprite) -> str:
    """What a plan calls a sprite."""
    return f"{sprite.colour}: {sprite.noun}" if sprite.colour else name(sprite)


def _place(placed: Placed) -> str:
    """Where a sprite stands in a plan."""
    return CORNERS[placed.corner] if placed == placed.quarter else f"{placed.side} at {placed.row} {placed.column}"


def without_plans(text: str) -> str:
    """A text without a plan at its end."""
    return re.sub(r" ?\bon [a-z]+: .*", "", text)
