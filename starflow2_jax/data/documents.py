"""Documents: lists of text parts and image parts. Sources make them; the sampler takes and returns them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from starflow2_jax.errors import UserError


@dataclass(frozen=True)
class Text:
    """A part of a document: words, which the tokenizer turns into tokens."""

    text: str
    predict: bool = False  # whether it counts as a prediction in training


@dataclass(frozen=True, eq=False)
class Image:
    """A part of a document: a picture, or the latents of one."""

    pixels: np.ndarray  # (height, width, C) fp32 in [-1, 1]; or latents (h, w, D), if the codec takes latents
    generate: bool = False  # whether it counts as a prediction in training
    via: str = (
        "flow"  # the model sees it as "flow" tokens, or through "vit", the VLM's vision tower, which generates nothing
    )
    encoded: bool = False  # the codec has encoded it: `pixels` are its latents (h, w, D), fp32 or bfloat16
    start: bool = False  # whether the tokens around it count as predictions, although it is not generated


Document = list[Text | Image]


@dataclass(frozen=True)
class Wordings:
    """A text in several wordings, such as the captions of a picture. Each reading of the document draws one of them."""

    texts: tuple[str, ...]
    predict: bool = False
    weights: tuple[float, ...] = ()  # of the draw; (): equal


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image that has not been read: a picture file, or an array (height, width, C) in a file of the name *.npy."""

    name: str  # for messages: where it is
    open: Callable[[], BinaryIO]
    generate: bool = False
    via: str = "flow"
    start: bool = False


@dataclass(frozen=True)
class Speaker:
    """Begins a turn of a conversation: the parts up to the next Speaker are what `role` says."""

    role: str  # "system", "user" or "assistant"


# What sources give: a document before its pictures are read, its wordings are drawn, and the chat template has laid out
# its turns (see preparation.py).
Draft = list[Text | Wordings | Image | StoredImage | Speaker]
Said = str | np.ndarray | Sequence[str | np.ndarray | Text | Image]


class DocumentError(UserError):
    """A document that cannot be read or does not fit. The message is one sentence for the document's author.

    index: the document's place among several, if it is known. kind: the kind of fault, under which it is
    counted.
    """

    kind = "document"

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index


class ImageError(DocumentError):
    """An image of a document that cannot be read."""

    kind = "image"


class LengthError(DocumentError):
    """A document that is larger than a row."""

    kind = "length"


def compose(said: Said) -> Document:
    """A document of one text, of one image (an array like `Image.pixels`), or of a list of texts, images and parts."""
    parts = [said] if isinstance(said, str | np.ndarray) else said
    return [Text(p) if isinstance(p, str) else Image(p) if isinstance(p, np.ndarray) else p for p in parts]


def counts(part: Text | Wordings | Image | StoredImage) -> bool:
    """Whether the part counts as a prediction, in training and in scores."""
    return part.generate or part.start if isinstance(part, Image | StoredImage) else part.predict
