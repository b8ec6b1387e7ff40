"""Text and JSON files of users. They are UTF-8 in every locale, with or without a byte order mark.

All functions raise `error`, a class of UserError that the caller chooses, for a file or text that cannot be used.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from starflow2_jax.errors import UserError

LARGEST = 2 * 10**9  # bytes of a file that is read whole
PIECE = 2**24  # bytes that are read at a time
# Escapes in JSON: a pair of surrogates, another escape, or (group 1) a surrogate without its other half.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\[^u]|\\u(?![dD][89a-fA-F])....|(\\u....)")


class LargeError(ValueError):
    """A file, or a line of it, is larger than what is read, or is no text at all."""


def read_text_file(path: str | Path, error: type[UserError] = UserError) -> str:
    """The text of a UTF-8 file of at most LARGEST bytes, without a byte order mark. Lines end with "\\n"."""
    try:
        with Path(path).open("rb") as file:
            content, nul, _ = read_bytes(file, LARGEST, until=b"\0").partition(b"\0")
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        if nul:
            raise error(f"{shorten(path)} cannot be read as text (byte {len(content)} is NUL); save it as UTF-8")
        return text
    except UserError:
        raise
    except UnicodeDecodeError as fault:
        raise error(
            f"{shorten(path)} cannot be read as text (byte {fault.start} is not UTF-8); save it as UTF-8"
        ) from None
    except FileNotFoundError:
        raise error(f"{shorten(path)} does not exist; check the path") from None
    except LargeError as fault:
        raise error(f"{shorten(path)} {fault}; name a smaller file, or split it") from None
    except (OSError, ValueError) as fault:
        raise error(f"{shorten(path)} cannot be read as text ({reason(fault)})") from None


def read_bytes(file: IO[bytes], most: int, until: bytes | None = None) -> bytes:
    """The content of an open file on disk, from its beginning; at most up to the piece that holds `until`.

    Raises LargeError for a file of more than `most` bytes, also for a device, which has a size of 0 and may never end.
    """
    pieces, left = [], most - os.fstat(file.fileno()).st_size
    while left >= 0 and (piece := file.read(PIECE)):
        pieces.append(piece)
        left = most - sum(map(len, pieces))
        if until is not None and until in piece:
            break
    if left < 0:
        raise LargeError(f"is larger than {most} bytes")
    return b"".join(pieces)


def bounded_lines(file: TextIO, most: int) -> Iterator[str]:
    """The lines of an open text file, with their ends. Raises LargeError for one with NUL or more than `most`
    characters.
    """
    line = ""
    while piece := file.readline(PIECE):
        line += piece
        if "\0" in piece or len(line) > most:
            raise LargeError("a line holds NUL" if "\0" in piece else f"a line has more than {most} characters")
        if piece.endswith(("\n", "\r")):
            yield line
            line = ""
    if line:
        yield line


def read_lines(path: str | Path, error: type[UserError] = UserError) -> list[str]:
    """The lines of a text file that are not blank, without their ends."""
    return [line for line in read_text_file(path, error).split("\n") if line.strip()]


def read_json_file(path: str | Path, error: type[UserError] = UserError) -> Any:
    """The value in a JSON file."""
    return parse_json(path, read_text_file(path, error), error)


def parse_json(where: str | Path, text: str, error: type[UserError] = UserError, one_line: bool = False) -> Any:
    """The value of a JSON text.

    `where`: the name of the text in messages. `one_line`: the text is a single line, so messages give only the column.
    """

    def place(at: int) -> str:
        column = f"column {at - text.rfind(chr(10), 0, at)}"
        return column if one_line else f"line {text.count(chr(10), 0, at) + 1}, {column}"

    try:
        value = json.loads(text)
    except json.JSONDecodeError as wrong:
        fault = f"is not valid JSON ({wrong.msg}: {place(wrong.pos)})"
    except RecursionError:
        fault = "is nested too deeply to be read as JSON"
    except ValueError:  # Python reads no integer of more than 4,300 digits
        fault = "holds a number with thousands of digits; write a shorter one"
    else:
        lone = next((match for match in _ESCAPES.finditer(text) if match[1]), None) if "\\u" in text else None
        if lone is None:
            return value
        fault = (
            f"holds half of a character (the lone surrogate {lone[1]}: {place(lone.start())}); complete or remove it"
        )
    raise error(f"{shorten(where)} {fault}")


def shorten(value: object, limit: int = 200) -> str:
    """A value as one line of printable text, cut after about `limit` characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def reason(error: Exception) -> str:
    """The message of an exception as one short line. That of an OSError leaves out the path."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shorten(" ".join(said.split())) or type(error).__name__


def with_tuples(values: Any) -> Any:
    """The same JSON value with tuples in place of lists, at any depth."""
    if isinstance(values, dict):
        return {k: with_tuples(v) for k, v in values.items()}
    return tuple(with_tuples(v) for v in values) if isinstance(values, list) else values
