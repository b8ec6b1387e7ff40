"""A JSONL file of the user's documents, one document per line."""

from codecs import BOM_UTF8
from dataclasses import dataclass

import numpy as np
from etils import epath

from starflow2_jax.data.documents import Document, DocumentError, Draft
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.json_documents import finished, from_json
from starflow2_jax.data.protocol import Source
from starflow2_jax.text_files import parse_json, reason, shorten

APART = 64  # documents between two whose offsets memory holds


@dataclass(frozen=True)
class JsonlOptions:
    """There are none."""


class JsonlDocuments(Source):
    """A JSONL file with one document (see `json_documents.from_json`) per line.

    Memory holds the offset of every 64th line: 125 kB for a million documents.

    Raises DocumentError for a file that cannot be read or has no documents, and for a line that is no document.
    """

    Options = JsonlOptions

    def __init__(self, path: str, options: JsonlOptions = JsonlOptions()):  # noqa: B008 - it is frozen
        self.path = epath.Path(path)
        begins, position, self.count = [], 0, 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if line.removeprefix(BOM_UTF8).strip():
                        if self.count % APART == 0:
                            begins.append(position)
                        self.count += 1
                    position += len(line)
        except OSError as error:
            raise DocumentError(f"{shorten(path)} cannot be read as text ({reason(error)})") from None
        if not begins:
            raise DocumentError(f"{shorten(path)} has no documents")
        self.begins = np.array(begins, np.int64)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, images: ImageReader) -> Document:
        """A document with its images read, for sampling. Raises DocumentError."""
        draft = self[index]
        try:
            return finished(draft, images)
        except DocumentError as error:
            raise type(error)(f"{self._name(index)}: {error}") from None

    def __getitem__(self, index: int) -> Draft:
        _, line = self._line(index)
        try:
            text = line.removeprefix(BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError as error:
            fault = f"it cannot be read as text (byte {error.start} is not UTF-8); save the file as UTF-8"
            raise DocumentError(f"{self._name(index)}: {fault}") from None
        try:
            return from_json(parse_json("it", text, DocumentError, one_line=True), self.path.parent)
        except DocumentError as error:
            raise type(error)(f"{self._name(index)}: {error}") from None

    def _line(self, index: int) -> tuple[int, bytes]:
        """The offset of a document's line in the file, and the line. Raises DocumentError."""
        begin, after = int(self.begins[index // APART]), index % APART
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                for line in file:
                    if line.removeprefix(BOM_UTF8).strip():
                        if not after:
                            return begin, line
                        after -= 1
                    begin += len(line)
        except OSError as error:
            raise DocumentError(f"{shorten(self.path)} cannot be read as text ({reason(error)})") from None
        raise DocumentError(
            f"{shorten(self.path)} has become shorter than it was when the run began; it needs all of its lines"
        )

    def _name(self, index: int) -> str:
        """The file, the document and its line, for messages."""
        before, _ = self._line(index)
        with self.path.open("rb") as file:
            line = 1 + sum(file.read(min(2**20, before - start)).count(b"\n") for start in range(0, before, 2**20))
        return f"{shorten(self.path)}, document {index} (line {line})"
