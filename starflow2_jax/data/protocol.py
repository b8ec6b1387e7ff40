"""The contract of a source: drafts of documents by index, for training, and for fitting a codec and a tokenizer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar

from starflow2_jax.codecs.fingerprint import fingerprint
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data.documents import DocumentError, Draft, Image, Speaker, StoredImage, Text, Wordings

Item = TypeVar("Item")
Read = TypeVar("Read")
FITTED = 1000  # a codec and a tokenizer are fitted to at most this many documents


class Source(Protocol):
    """Drafts of documents by index: `source[i]` is always the same. Opening a source reads no document.

    A source that inherits from this class may leave out `codec`, `encoded_by`, `images` and `texts`. Training shuffles
    the indices anew each epoch. A source is pickled when documents are read in processes of their own.
    """

    Options: ClassVar[type]  # a frozen dataclass: the keys of `data.sources.NAME` that only this source has

    def __init__(self, path: str, options: Any) -> None:
        """Open the source. path: its `path` in the config. options: an instance of `Options`. Raises UserError."""

    def __len__(self) -> int:
        """Number of documents in an epoch, at most 2**32."""
        ...

    def __getitem__(self, index: int) -> Draft:
        """Raises DocumentError, whose message names the place, for a document that cannot be read."""
        ...

    def codec(self) -> Codec | None:
        """The codec that has encoded the documents' flow images; None: they are not encoded. Raises UserError."""
        return None

    def encoded_by(self) -> str | None:
        """The fingerprint of `codec()`, for which a source with a large codec need not read its weights."""
        return fingerprint(codec) if (codec := self.codec()) else None

    def images(self) -> Iterable[Image | StoredImage]:
        """The flow images that a codec is fitted to."""
        return (part for part in self._fitted() if isinstance(part, Image | StoredImage) and part.via == "flow")

    def texts(self) -> Iterable[str]:
        """The texts that a tokenizer is trained on."""
        for part in self._fitted():
            if isinstance(part, Text | Wordings):
                yield from part.texts if isinstance(part, Wordings) else (part.text,)

    def _fitted(self) -> Iterable[Text | Wordings | Image | StoredImage | Speaker]:
        documents = readable(range(min(len(self), FITTED)), self.__getitem__)
        return (part for document in documents for part in document)


def readable(items: Iterable[Item], read: Callable[[Item], Read]) -> Iterator[Read]:
    """read(item) of each item that can be read. Training counts the others when it reads them. If none can be read,
    raises the DocumentError of the first.
    """
    found, failed = False, None
    for item in items:
        try:
            value = read(item)
        except DocumentError as error:
            failed = failed or error
            continue
        found = True
        yield value
    if failed and not found:
        raise failed
