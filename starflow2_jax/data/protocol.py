"""What a source is: documents by index, which training reads, and what a codec and a tokenizer are fitted to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text

FITTED = 1000  # documents that a codec and a tokenizer are fitted to


class Source(Protocol):
    """Rows of documents: `len`, `[i]`, the same document for the same i. Cheap to open: no document is read for it.

    A source that inherits from this class needs no `for_stage`, `images` and `texts` of its own.
    """

    Options: ClassVar[type]  # a frozen dataclass: the keys of a config's `data` section that are this source's own

    def __init__(self, where: str, channels: int, options: Any) -> None:
        """`where`: the config's `data.source`; `channels`: of an image file when it is read, 1 (gray) or 3 (RGB).

        Raises UserError.
        """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def for_stage(self, shares: Mapping[str, float], seed: int) -> Sequence[Document]:
        """The documents of one stage. `shares`: of each kind of document, for sources that have kinds; others ignore
        it. `seed`: for sources that draw what they show. Raises UserError."""
        return self

    def images(self) -> Iterable[np.ndarray]:
        """The flow images that a codec is fitted to."""
        return (part.pixels for part in self._fitted() if isinstance(part, Image) and part.via == "flow")

    def texts(self) -> Iterable[str]:
        """The texts that a tokenizer is trained on."""
        return (part.text for part in self._fitted() if isinstance(part, Text))

    def _fitted(self) -> Iterable[Text | Image]:
        return (part for i in range(min(len(self), FITTED)) for part in self[i])
