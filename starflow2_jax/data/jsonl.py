"""A file of JSON records, one per line or all in one array: documents of this project's format, and conversations."""

import contextlib
import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from starflow2_jax.data.documents import Document, DocumentError, Draft, Image, StoredImage
from starflow2_jax.data.images import locate
from starflow2_jax.data.json_documents import finished, from_json
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.rows import from_conversation, is_conversation
from starflow2_jax.fields import option
from starflow2_jax.text_files import parse_json, reason, shorten

APART = 64  # documents between two whose offsets memory holds
LONGEST = 2**24  # bytes of a record
ENDLESS = 2**30  # bytes of a line in a file that is taken for something else than lines
PIECE = 2**20  # bytes that are read at a time
TOO_LONG = f"it is longer than {LONGEST >> 20} MiB; store pictures as files of their own and give their paths"
OPENING = re.compile(rb"(?:%s)?\s*\[\s*(?=[\[{])" % BOM_UTF8)  # of an array of objects or lists
BETWEEN = re.compile(r"\s*(,\s*|\]|$)")  # two values of an array


@dataclass(frozen=True)
class JsonlOptions:
    """Where the pictures are."""

    images: str = option('folder where the pictures\' relative paths begin; "": the folder of the file', "")


class JsonlDocuments(Source):
    """A file of JSON records: one per line, or one array of them. Its first bytes tell which of the two it is.

    A record is a document (see `json_documents.from_json`) or a conversation (see `rows.from_conversation`). Memory
    holds the offset of every 64th record: 125 kB for a million.

    Raises DocumentError for a file that cannot be read or has no documents, and for a record that is no document.
    """

    Options = JsonlOptions

    def __init__(self, path: str, options: JsonlOptions = JsonlOptions()):  # noqa: B008 - it is frozen
        self.path = locate(str(path), epath.Path(), "file")
        self.folder = locate(options.images, epath.Path(), "folder") if options.images else self.path.parent
        begins, self.count = [], 0
        try:
            with _opened(self.path) as file:
                self.array = _opening(file)
                for begin, _ in self._records(file, self.array or 0):
                    if self.count % APART == 0:
                        begins.append(begin)
                    self.count += 1
        except OSError as error:
            raise DocumentError(f"{shorten(path)} cannot be read as text ({reason(error)})") from None
        except DocumentError as error:
            place = "" if self.array is None else f" record {self.count} of the array:"
            raise DocumentError(f"{shorten(path)},{place} {error}") from None
        if not begins:
            raise DocumentError(f"{shorten(path)} has no documents; give a file with at least one record")
        self.begins = np.array(begins, np.int64)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, images: Callable[[StoredImage], Image]) -> Document:
        """A document with its images read, for sampling. Raises DocumentError."""
        draft = self[index]
        try:
            return finished(draft, images)
        except DocumentError as error:
            raise type(error)(f"{self._name(index)}: {error}") from None

    def __getitem__(self, index: int) -> Draft:
        _, record = self._record(index)
        try:
            if len(record) > LONGEST:
                raise DocumentError(TOO_LONG)
            text = record.removeprefix(BOM_UTF8).decode("utf-8")
            value = parse_json("it", text, DocumentError, one_line=True)
            return from_conversation(value, self.folder) if is_conversation(value) else from_json(value, self.folder)
        except UnicodeDecodeError as error:
            fault = f"it cannot be read as text (byte {error.start} is not UTF-8); save the file as UTF-8"
            raise DocumentError(f"{self._name(index)}: {fault}") from None
        except DocumentError as error:
            raise type(error)(f"{self._name(index)}: {error}") from None

    def _records(self, file: BinaryIO, begin: int) -> Iterator[tuple[int, bytes]]:
        file.seek(begin)
        return _lines(file, begin) if self.array is None else _values(file, begin)

    def _record(self, index: int) -> tuple[int, bytes]:
        """The offset of a record in the file, and the record. Raises DocumentError."""
        try:
            with _opened(self.path) as file:
                records = self._records(file, int(self.begins[index // APART]))
                for _ in range(index % APART):
                    next(records)
                return next(records)
        except OSError as error:
            raise DocumentError(f"{shorten(self.path)} cannot be read as text ({reason(error)})") from None
        except StopIteration:
            raise DocumentError(
                f"{shorten(self.path)} has become shorter than it was when the run began; it needs all of its lines"
            ) from None

    def _name(self, index: int) -> str:
        """The file, the document and its line, for messages."""
        before, _ = self._record(index)
        with _opened(self.path) as file:
            return f"{shorten(self.path)}, document {index} (line {_line_number(file, before)})"


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if isinstance(file, io.BufferedReader):
            yield file
        else:
            raw: Any = file
            with io.BufferedReader(raw, PIECE) as buffered:  # a file in a bucket reads only whole lines
                yield buffered


def _opening(file: BinaryIO) -> int | None:
    """The offset of the first value, where the file is an array of records; None where each line is a record.

    A line may be an array, too: a document of {"text": ...} and {"image": ...} parts.
    """
    for size in (PIECE, LONGEST):
        file.seek(0)
        head = file.read(size)
        if not (opening := OPENING.match(head)):
            return None
        try:
            value, _ = json.JSONDecoder().raw_decode(head.decode("latin-1"), opening.end())
        except (ValueError, RecursionError):  # it is cut off; or broken, and then reported when it is read
            continue
        return opening.end() if isinstance(value, list) or is_conversation(value) else None
    return None


def _lines(file: BinaryIO, begin: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their offsets. A line above LONGEST bytes is cut to its first LONGEST + 1.

    Raises DocumentError where a line above LONGEST holds NUL bytes, as a sparse file does, or is longer than ENDLESS.
    """
    while line := file.readline(LONGEST + 1):
        at, rest = begin, line
        begin += len(line)
        while len(rest) >= PIECE and not rest.endswith(b"\n"):
            if b"\0" in rest or begin - at > ENDLESS:
                fault = "holds NUL bytes" if b"\0" in rest else f"is longer than {ENDLESS >> 30} GiB"
                raise DocumentError(
                    f"line {_line_number(file, at)} {fault}, so it is no JSON; fetch or write the file again"
                )
            rest = file.readline(PIECE)
            begin += len(rest)
        if line.removeprefix(BOM_UTF8).strip():
            yield at, line


def _line_number(file: BinaryIO, at: int) -> int:
    """The number, from 1, of the line that begins at byte `at`. Moves the file's position."""
    file.seek(0)
    return 1 + sum(file.read(min(PIECE, at - start)).count(b"\n") for start in range(0, at, PIECE))


def _values(file: BinaryIO, begin: int) -> Iterator[tuple[int, bytes]]:
    """The values of a JSON array with their offsets, from the one at `begin`, where the file stands, to the array's
    end.

    The bytes are decoded as Latin-1, where a character is a byte: bytes above 127 stand only within strings. Raises
    DocumentError for an array that is broken or cut off.
    """
    decode, text, at, size = json.JSONDecoder().raw_decode, "", 0, PIECE
    while True:
        fault = "it is not closed"
        try:
            _, end = decode(text, at)
            after = BETWEEN.match(text, end)
            if after is None:
                raise DocumentError(f'a "," or "]" is missing at byte {begin + end}')
            last = after[1] == "]"
            if last or after.end() < len(text):
                yield begin + at, text[at:end].encode("latin-1")
                if last:
                    return
                at, size = after.end(), PIECE
                continue
        except json.JSONDecodeError as error:
            fault = error.msg
        except RecursionError:
            raise DocumentError("it is nested too deeply to be read as JSON") from None
        except DocumentError:
            raise
        except ValueError:  # Python reads no integer of more than 4,300 digits
            raise DocumentError("it holds a number with thousands of digits; write a shorter one") from None
        if len(text) - at > LONGEST:
            raise DocumentError(f"at byte {begin + at}, it is no JSON ({fault}), or {TOO_LONG}")
        more = file.read(size)
        if not more:
            raise DocumentError(f"the array is cut off, or no valid JSON, at byte {begin + at} ({fault})")
        begin, text, at, size = begin + at, text[at:] + more.decode("latin-1"), 0, 2 * size
