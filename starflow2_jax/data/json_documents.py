"""Documents of this project's own JSON format: a list of {"text": ...} and {"image": ...} parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from starflow2_jax.data.documents import Document, DocumentError, Draft, Image, Speaker, StoredImage, Text, Wordings
from starflow2_jax.data.images import ImageReader, locate, stored
from starflow2_jax.text_files import read_json_file, shorten

PART_KEYS: dict[str, dict[str, Any]] = {
    "text": {"text": str | list, "predict": bool},
    "image": {"image": str, "generate": bool, "via": str},
}
JSON_TYPES = {str: "a string", bool: "true or false", str | list: "a string, or a list of strings"}


def from_json(parts: object, folder: epath.Path) -> Draft:
    """The document that a JSON value describes.

    parts: a list of {"text": str, "predict": bool} and {"image": path, "generate": bool, "via": str}; only "text" and
        "image" are required. "text" may be a list of strings: the wordings, of which each reading draws one. A path is
        relative to `folder`.

    Raises DocumentError.
    """
    if not isinstance(parts, list) or not parts:
        raise DocumentError('a document is a non-empty list of {"text": ...} and {"image": ...} parts')
    return [_part(i, part, folder) for i, part in enumerate(parts)]


def _part(i: int, part: object, folder: epath.Path) -> Text | Wordings | StoredImage:
    where = f"part {i} of the document"
    if not isinstance(part, dict) or not (part.keys() & PART_KEYS.keys() or "video" in part):
        raise DocumentError(f'{where} is neither {{"text": ...}} nor {{"image": ...}}')
    if "video" in part:
        raise DocumentError(f"{where} is a video, which this model does not take; give frames as images")
    kind = "text" if "text" in part else "image"
    _require_types(where, kind, part)
    if kind == "text":
        return _text(where, part["text"], part.get("predict", False))
    if part.get("via", "flow") not in ("flow", "vit"):
        raise DocumentError(f'{where}: "via" must be "flow" or "vit", not {shorten(repr(part["via"]))}')
    try:
        return stored(locate(part["image"], folder), part.get("generate", False), part.get("via", "flow"))
    except DocumentError as error:
        raise type(error)(f"{where}: {error}") from None


def _text(where: str, text: str | list, predict: bool) -> Text | Wordings:
    if isinstance(text, str):
        return Text(text, predict)
    if not text or not all(isinstance(each, str) for each in text):
        raise DocumentError(f"{where}: a list of wordings must hold at least one string, and nothing but strings")
    return Wordings(tuple(text), predict)


def _require_types(where: str, kind: str, part: dict[str, Any]) -> None:
    keys = PART_KEYS[kind]
    for key, value in part.items():
        if key not in keys:
            raise DocumentError(
                f"{where} has the key {shorten(repr(key))}; the keys of a {kind} part are {', '.join(keys)}"
            )
        if not isinstance(value, keys[key]):
            raise DocumentError(f"{where}: the value of {key!r} must be {JSON_TYPES[keys[key]]}")


def read_document(path: str | Path, reader: ImageReader) -> Document:
    """The document in a JSON file (see `from_json`), with its images read by `reader`. Raises DocumentError."""
    value = read_json_file(path, DocumentError)
    return finished(from_json(value, epath.Path(path).parent), reader)


def finished(draft: Draft, reader: Callable[[StoredImage], Image]) -> Document:
    """A draft with its images read, and the first of its wordings. Raises DocumentError that names the part."""
    parts: Document = []
    for i, part in enumerate(draft):
        try:
            parts.append(_finished(part, reader))
        except DocumentError as error:
            raise type(error)(f"part {i} of the document: {error}") from None
    return parts


def _finished(
    part: Text | Wordings | Image | StoredImage | Speaker, reader: Callable[[StoredImage], Image]
) -> Text | Image:
    if isinstance(part, Speaker):
        raise DocumentError(
            'a turn of a conversation is not read here; give a document of {"text": ...} and {"image": ...} parts'
        )
    if isinstance(part, StoredImage):
        return reader(part)
    return Text(part.texts[0], part.predict) if isinstance(part, Wordings) else part
