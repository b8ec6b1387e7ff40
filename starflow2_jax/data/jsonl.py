"""One's own documents: a JSONL file, one document a line."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, from_json, parse_json
from starflow2_jax.data.protocol import Source


@dataclass(frozen=True)
class JsonlOptions:
    """The file says all."""


class JsonlDocuments(Source):
    """A JSONL file, one document (see `documents.from_json`) a line. Only where each line begins is held in memory.

    Raises DocumentError for a file that cannot be read or has no documents, or a document that is not one.
    """

    Options = JsonlOptions

    def __init__(self, where: str | Path, channels: int, options: JsonlOptions = JsonlOptions()):  # noqa: B008 - it is frozen
        self.path, self.channels = Path(where), channels
        begins, position = [], 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if line.strip():
                        begins.append(position)
                    position += len(line)
        except OSError as error:
            raise DocumentError(f"{where} cannot be read as text ({error})") from None
        if not begins:
            raise DocumentError(f"{where} has no documents")
        self.begins = np.array(begins, np.int64)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Document:
        begin, where = self.begins[index], f"{self.path}, document {index}"
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                line = file.readline().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(f"{where} cannot be read as text ({error})") from None
        try:
            return from_json(parse_json(where, line), self.path.parent, self.channels)
        except DocumentError as error:
            raise DocumentError(f"{where}: {error}") from None
