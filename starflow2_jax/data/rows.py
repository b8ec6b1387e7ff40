"""Rows of named columns, as other formats have them, -> drafts: conversations, edits, captioned pictures."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from starflow2_jax.data.documents import DocumentError, Draft, ImageError, Speaker, StoredImage, Text, Wordings
from starflow2_jax.data.images import locate, stored
from starflow2_jax.errors import shown
from starflow2_jax.fields import option

CONVERSATIONS = ("conversations", "messages")  # of LLaVA; of OpenAI and ms-swift
EDITS = ("image_list", "instruction_list")  # of BAGEL
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = re.compile(r"\n?<image>\n?")  # LLaVA writes it on a line of its own


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The columns of captioned pictures. Conversations and edits are recognised by the names of their columns."""

    image: str = option("column of the picture that is generated", "image")
    captions: tuple[str, ...] = option(
        "columns of its captions or of its class, as far as a row has them", ("caption", "captions", "text")
    )
    template: str = option("the caption that a class becomes: its name stands for {}", "{}")

    def classes(self, row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The row, with a caption in place of each class number. names: column -> names of its classes, by number."""
        words = {
            column: self.template.replace("{}", str(names[column][row[column]]).replace("_", " "))
            for column in self.captions
            if column in names and row[column] is not None
        }
        return {**row, **words}


def from_row(row: Mapping[str, Any], options: RowOptions, folder: epath.Path) -> Draft:
    """The draft of a row. folder: where the relative paths of its pictures begin. Raises DocumentError."""
    if is_conversation(row):
        return from_conversation(row, folder)
    if all(name in row for name in EDITS):
        return _edits(row, folder)
    if row.get(options.image) is None:
        raise DocumentError(f"it has no picture {options.image!r}; it has {shown(', '.join(map(str, row)))}")
    captions = [text for name in options.captions if name in row for text in _captions(row[name])]
    if not captions:
        raise DocumentError(
            f"it has no caption {' or '.join(map(repr, options.captions))}; it has {shown(', '.join(map(str, row)))}"
        )
    return [Wordings(tuple(captions)), picture(row[options.image], folder, generate=True)]


def picture(value: object, folder: epath.Path, generate: bool = False) -> StoredImage:
    """The picture that a row gives as a path, as the bytes of a file, or as {"bytes", "path"} or {"url"}.

    Raises ImageError.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, bytes):
        return StoredImage("in the row", lambda: io.BytesIO(value), generate)
    if isinstance(value, str):
        return stored(locate(value, folder), generate)
    raise ImageError(f"an image must be a path or the bytes of a file, not {shown(value)}")


def is_conversation(row: object) -> bool:
    """Whether a value is a conversation of LLaVA's, OpenAI's or ms-swift's form."""
    return isinstance(row, Mapping) and any(name in row for name in CONVERSATIONS)


def from_conversation(row: Mapping[str, Any], folder: epath.Path) -> Draft:
    """The draft of a conversation, whose assistant's turns are predicted.

    row: {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...], "image": path or list of paths},
    or
        {"messages": [{"role": "user", "content": text or list of parts}, ...], "images": list}. Each <image> in a text
        stands for the next picture of the row.

    Raises DocumentError.
    """
    name = next(name for name in CONVERSATIONS if name in row)
    turns = row[name]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DocumentError(f"{name!r} is a list of turns, not {shown(turns)}")
    given = next((row[key] for key in ("images", "image") if row.get(key)), [])
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
    images = iter(values)
    draft: Draft = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DocumentError(f"turn {i} is an object, not {shown(turn)}")
        said = turn.get("from", turn.get("role"))
        if said not in ROLES:
            raise DocumentError(f"turn {i} is by {shown(said)}; turns are by {', '.join(ROLES)}")
        role = ROLES[said]
        draft.append(Speaker(role))
        draft += _said(i, turn.get("value", turn.get("content")), role == "assistant", images, folder)
    if left := sum(1 for _ in images):
        raise DocumentError(
            f"the conversation has {len(values)} images, and {len(values) - left} places <image> for them"
        )
    return draft


def _said(
    i: int, content: object, predict: bool, images: Iterator[object], folder: epath.Path
) -> Iterator[Text | StoredImage]:
    """The parts of a turn."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise DocumentError(f"turn {i} says {shown(content)}, which is neither a text nor a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            for j, words in enumerate(MARK.split(part["text"].strip())):
                if j:
                    yield _next_picture(i, images, folder, predict)
                if words:
                    yield Text(words, predict)
        elif kind in ("image", "image_url"):
            value = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            yield _next_picture(i, images, folder, predict) if value is None else picture(value, folder, predict)
        else:
            raise DocumentError(f"turn {i} has the part {shown(part)}; parts are texts and images")


def _next_picture(i: int, images: Iterator[object], folder: epath.Path, generate: bool) -> StoredImage:
    try:
        return picture(next(images), folder, generate)
    except StopIteration:
        raise DocumentError(f"turn {i} has an <image> for which the row has no picture") from None


def _edits(row: Mapping[str, Any], folder: epath.Path) -> Draft:
    """A picture, then an instruction and the picture that results from it, repeated."""
    images, instructions = (list(row[name]) for name in EDITS)
    if len(images) != len(instructions) + 1:
        raise DocumentError(f"{len(images)} images of an edit need one instruction fewer, not {len(instructions)}")
    draft: Draft = [picture(images[0], folder)]
    for instruction, image in zip(instructions, images[1:], strict=True):
        draft += [Wordings(tuple(_captions(instruction))), picture(image, folder, generate=True)]
    return draft


def _captions(value: object) -> list[str]:
    """All texts of a caption column: a text, a list of texts, an object of texts, or such an object as JSON."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # it is a text that begins with a brace
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, Sequence):
        return []
    return [text for each in value for text in _captions(each)]
