"""Turns drafts into documents: reads the images, and draws wordings, crops and what is left out anew at each
reading.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from starflow2_jax.data.documents import (
    Document,
    DocumentError,
    Draft,
    Image,
    ImageError,
    Speaker,
    StoredImage,
    Text,
    Wordings,
    counts,
)  # fmt: skip
from starflow2_jax.data.images import CROPS, ImageReader, View
from starflow2_jax.data.tokenizer import conversation
from starflow2_jax.errors import UserError
from starflow2_jax.fields import option

Drawn = list[Text | Image | StoredImage]  # a draft whose wordings are drawn


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """The keys that every source has."""

    path: str = option("where the documents are: a file, a folder, a bucket, or the name of a built-in source")
    via: str = option(
        'how the model sees images that are not generated: "flow", "vit", or "" as the documents say',
        "",
        choices=("", "flow", "vit"),
    )
    wording_weights: tuple[float, ...] = option("weights of a text's wordings, in their order; (): equal", (), least=0)
    text_drop: float = option(
        "share of generated images without the texts before them, for guidance", 0.05, least=0, most=1
    )
    image_drop: float = option("share of generated images without the images before them", 0.05, least=0, most=1)
    both_drop: float = option("share of generated images with nothing before them", 0.05, least=0, most=1)
    crop: str = option(
        "where a picture is cropped to the size of flow images, after its short side was scaled; none: it must fit",
        "center",
        choices=CROPS,
    )
    flip: bool = option("mirror half of the documents, with all of their pictures, from left to right", False)

    def __post_init__(self):
        if self.text_drop + self.image_drop + self.both_drop > 1:
            raise UserError(
                "text_drop, image_drop and both_drop are shares of the same documents; let them add up to at most 1"
            )


def unvaried(source: SourceConfig) -> SourceConfig:
    """The same options without crops and flips at random."""
    return replace(source, crop="center" if source.crop == "random" else source.crop, flip=False)


@dataclass(frozen=True)
class Preparation:
    """Makes a document of a draft, with draws of its own each time.

    source: the options of the draft's source. images: reads flow images at the codec's size. drops: whether anything is
    left out, which serves guidance. words_only: all images are shown through the vision tower, and all text is
    predicted. tokenizer: its chat template lays out conversations.
    """

    source: SourceConfig
    images: ImageReader
    drops: bool = False
    words_only: bool = False
    tokenizer: Any = None

    def __call__(self, draft: Draft, rng: np.random.Generator) -> Document:
        """Raises DocumentError that names the part."""
        parts = self._laid_out([self._worded(part, rng) for part in draft])
        parts = [shown(part) for part in parts] if self.words_only else [self._seen(part) for part in parts]
        if self.drops:
            parts = self._dropped(parts, rng)
        return self._read(parts, self._view(rng))

    def _laid_out(self, parts: list[Text | Image | StoredImage | Speaker]) -> Drawn:
        turns: list[tuple[str, Drawn]] = []
        for part in parts:
            if isinstance(part, Speaker):
                turns.append((part.role, []))
            elif turns:
                turns[-1][1].append(part)
        return conversation(self.tokenizer, turns) if turns else [p for p in parts if not isinstance(p, Speaker)]

    def _worded(
        self, part: Text | Wordings | Image | StoredImage | Speaker, rng: np.random.Generator
    ) -> Text | Image | StoredImage | Speaker:
        if not isinstance(part, Wordings):
            return part
        weights = np.ones(len(part.texts))
        if given := part.weights or self.source.wording_weights:
            weights = np.resize([*given[: len(weights)], *[0.0] * (len(weights) - len(given))], len(weights))
        if not weights.sum() > 0:
            raise DocumentError(f"all of a text's {len(weights)} wordings have a weight of 0; see wording_weights")
        return Text(part.texts[rng.choice(len(weights), p=weights / weights.sum())], part.predict)

    def _seen(self, part: Text | Image | StoredImage) -> Text | Image | StoredImage:
        if isinstance(part, Text) or part.generate or not self.source.via:
            return part
        return replace(part, via=self.source.via)

    def _dropped(self, parts: Drawn, rng: np.random.Generator) -> Drawn:
        """With the shares of the options: one generated image, drawn at random, after a part of what came before it."""
        source, draw = self.source, rng.random()
        made = [i for i, part in enumerate(parts) if not isinstance(part, Text) and part.generate]
        if not made or draw >= source.text_drop + source.image_drop + source.both_drop:
            return parts
        last = int(rng.choice(made))
        if draw < source.text_drop:
            kept: tuple[type, ...] = (Image, StoredImage)
        else:
            kept = (Text,) if draw < source.text_drop + source.image_drop else ()
        if kept == (Text,) and not any(isinstance(part, Image | StoredImage) for part in parts[:last]):
            return parts  # there is no image to leave out
        return [*(given(part) for part in parts[:last] if isinstance(part, kept)), parts[last]]

    def _view(self, rng: np.random.Generator) -> View:
        place = tuple(rng.random(2).tolist()) if self.source.crop == "random" else (0.5, 0.5)
        return View(place, self.source.flip and rng.random() < 0.5)

    def _read(self, parts: Drawn, view: View) -> Document:
        reader = self.images if self.source.crop != "none" else replace(self.images, size=None)
        document: Document = []
        for i, part in enumerate(parts):
            try:
                if isinstance(part, Image) and part.encoded and (self.source.flip or self.source.crop == "random"):
                    raise ImageError(
                        "encoded images cannot be cropped or mirrored; set the source to flip=False and crop=center"
                    )
                document.append(reader(part, view) if isinstance(part, StoredImage) else part)
            except DocumentError as error:
                raise type(error)(f"part {i} of the document: {error}") from None
        return document


def shown(part: Text | Image | StoredImage) -> Text | Image | StoredImage:
    """The part as a stage that trains the VLM sees it: images through the vision tower, every text predicted, and where
    an image to generate begins.
    """
    if isinstance(part, Text):
        return replace(part, predict=True)
    return replace(part, generate=False, via="vit", start=part.generate)


def given(part: Text | Image | StoredImage) -> Text | Image | StoredImage:
    """The part as one that is not predicted."""
    if not counts(part):
        return part
    return replace(part, predict=False) if isinstance(part, Text) else replace(part, generate=False, start=False)
