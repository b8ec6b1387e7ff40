"""The contract of a source: documents by index, for training, and for fitting a codec and a tokenizer."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from starflow2_jax.data.documents import Document, Documents, Image, Text

FITTED = 1000  # a codec and a tokenizer are fitted to at most this many documents


class Source(Protocol):
    """Documents by index: `source[i]` is always the same document. Opening a source reads no document.

    A source that inherits from this class may leave out `for_stage`, `images` and `texts`.
    """

    Options: ClassVar[type]  # a frozen dataclass: the keys of a config's `data` section that only this source has

    def __init__(self, where: str, channels: int, options: Any) -> None:
        """Open the source.

        where: the config's `data.source`. channels: image files are read with these channels, 1 (gray) or 3 (RGB).
        options: an instance of `Options`. Raises UserError.
        """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def for_stage(self, shares: Mapping[str, float], seed: int) -> Documents:
        """The documents of one stage.

        shares: kind -> share of documents, for a source that has several kinds; others ignore it.
        seed: of the random draws of a source that makes its documents; others ignore it. Raises UserError.
        """
        return self

    def images(self) -> Iterable[np.ndarray]:
        """The flow images (height, width, C) that a codec is fitted to."""
        return (part.pixels for part in self._fitted() if isinstance(part, Image) and part.via == "flow")

    def texts(self) -> Iterable[str]:
        """The texts that a tokenizer is trained on."""
        return (part.text for part in self._fitted() if isinstance(part, Text))

    def _fitted(self) -> Iterable[Text | Image]:
        return (part for i in range(min(len(self), FITTED)) for part in self[i])
