"""The source `scenes`: endless documents about emoji scenes, whose pictures are rendered when they are read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.scenes.art import FEWEST
from starflow2_jax.data.scenes.kinds import KINDS, Draw, Parts, Shown
from starflow2_jax.data.scenes.scene import UNITS, held_out, in_quarters, render, visible
from starflow2_jax.data.scenes.words import plan
from starflow2_jax.errors import UserError
from starflow2_jax.fields import option

PARTS = ("train", "validation", "test", "held_out")
NEVER = ("single", "background")  # kinds that combine nothing that could be held out
# What a held-out caption of a kind combines. A held-out document of any other kind combines anything that is held out.
COMBINES = {"colour": "colour", "tone": "tone", "counting": "count"} | dict.fromkeys(
    ("two", "position", "attribution"), "pair"
)
FITTED = 200  # documents of each source that a codec is fitted to
WORDED = 1500  # documents of each source whose words a tokenizer is trained on


@dataclass(frozen=True)
class SceneOptions:
    """Which documents are made, and how large their pictures are."""

    kind: str = option("kind of documents", "single", choices=KINDS)
    part: str = option(
        'combinations that are shown: held_out has those that the others never show; "validation" and "test" have '
        'documents of their own, like those of "train"',
        "train",
        choices=PARTS,
    )
    size: int = option("side of a picture in pixels, 32 or 64", 32, least=UNITS, most=2 * UNITS)
    objects: int = option("number of nouns in the vocabulary; 0: all", 60, least=0)
    plan: bool = option(
        "before each picture to draw, the words of its plan: its ground, its sprites, their sizes and places", False
    )
    quarters: bool = option("every sprite fills one quarter of its picture; otherwise sides and places vary", False)


class Scenes(Source):
    """2**32 documents of one kind. Document i depends only on the options and i.

    Raises UserError for a size other than 32 and 64, for a vocabulary of 1 to 15 nouns, and for held-out documents of a
    kind that has no held-out combinations.
    """

    Options = SceneOptions

    def __init__(self, path: str = "scenes", options: SceneOptions = SceneOptions()):  # noqa: B008 - it is frozen
        if options.size % UNITS:
            raise UserError(f"the scenes' size must be {UNITS} or {2 * UNITS}, not {options.size}")
        if 0 < options.objects < FEWEST:
            raise UserError(
                f"the scenes' option objects must be at least {FEWEST}, or 0 for all nouns, not {options.objects}"
            )
        if options.part == "held_out" and options.kind in NEVER:
            raise UserError(f"scenes of the kind {options.kind} have no held-out combinations; use part=test")
        self.options = options

    def __len__(self) -> int:
        return 2**32

    def __getitem__(self, index: int) -> Document:
        return rendered(self.parts(index), self.options.size)

    def parts(self, index: int) -> Parts:
        """Document `index` with scenes in the place of pictures."""
        kind, part = self.options.kind, self.options.part
        rng = np.random.default_rng((list(KINDS).index(kind), PARTS.index(part), index))
        while True:
            parts = KINDS[kind](Draw(rng, self.options.objects, in_line=self.options.quarters))
            if self.options.quarters:
                parts = [
                    replace(part, scene=in_quarters(part.scene)) if isinstance(part, Shown) else part for part in parts
                ]
            if self.options.plan:
                parts = [each for part in parts for each in planned(part)]
            scenes = [each.scene for each in parts if isinstance(each, Shown)]
            if all(visible(scene) for scene in scenes) and self._belongs(set().union(*map(held_out, scenes))):
                return parts

    def _belongs(self, combined: set[str]) -> bool:
        """Whether a document with these held-out combinations is of this part."""
        if self.options.part != "held_out":
            return not combined
        wanted = COMBINES.get(self.options.kind)
        return combined == {wanted} if wanted else bool(combined)

    def images(self) -> Iterator[Image]:
        """The pictures of the first documents."""
        return (part for i in range(FITTED) for part in self[i] if isinstance(part, Image))

    def texts(self) -> Iterator[str]:
        """The texts of the first documents."""
        return (part.text for i in range(WORDED) for part in self.parts(i) if isinstance(part, Text))


def planned(part: Text | Shown) -> Parts:
    """The part; a picture to draw comes after its plan, which is to be written."""
    if isinstance(part, Text) or not part.generate:
        return [part]
    return [Text(f" {plan(part.scene)}", predict=True), part]


def rendered(parts: Parts, size: int) -> Document:
    """The document: scenes become pictures (size, size, 3) in [-1, 1]."""
    return [Image(render(part.scene, size), part.generate) if isinstance(part, Shown) else part for part in parts]
