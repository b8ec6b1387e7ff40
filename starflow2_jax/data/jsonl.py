"""A JSONL file of the user's documents, one document per line."""

from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, from_json
from starflow2_jax.data.protocol import Source
from starflow2_jax.text_files import parse_json, reason, shorten


@dataclass(frozen=True)
class JsonlOptions:
    """There are none."""


class JsonlDocuments(Source):
    """A JSONL file with one document (see `documents.from_json`) per line. Memory holds only the offset of each line.

    Raises DocumentError for a file that cannot be read or has no documents, and for a line that is no document.
    """

    Options = JsonlOptions

    def __init__(self, where: str | Path, channels: int, options: JsonlOptions = JsonlOptions()):  # noqa: B008 - it is frozen
        self.path, self.channels = Path(where), channels
        begins, position = [], 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if line.removeprefix(BOM_UTF8).strip():
                        begins.append(position)
                    position += len(line)
        except OSError as error:
            raise DocumentError(f"{shorten(where)} cannot be read as text ({reason(error)})") from None
        if not begins:
            raise DocumentError(f"{shorten(where)} has no documents")
        self.begins = np.array(begins, np.int64)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Document:
        begin = int(self.begins[index])
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                line = file.readline().removeprefix(b"" if begin else BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError as error:
            fault = f"it cannot be read as text (byte {error.start} is not UTF-8); save the file as UTF-8"
            raise DocumentError(f"{self._name(index)}: {fault}") from None
        except OSError as error:
            raise DocumentError(f"{shorten(self.path)} cannot be read as text ({reason(error)})") from None
        try:
            return from_json(parse_json("it", line, DocumentError, one_line=True), self.path.parent, self.channels)
        except DocumentError as error:
            raise DocumentError(f"{self._name(index)}: {error}") from None

    def _name(self, index: int) -> str:
        """The file, the document and its line, for messages."""
        before = int(self.begins[index])
        with self.path.open("rb") as file:
            line = 1 + sum(file.read(min(2**20, before - start)).count(b"\n") for start in range(0, before, 2**20))
        return f"{shorten(self.path)}, document {index} (line {line})"
