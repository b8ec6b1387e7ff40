"""Drafts <-> bytes: the records of encoded folders."""

import io
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from starflow2_jax.data.documents import DocumentError, Draft, Image, Speaker, StoredImage, Text, Wordings

LATENTS, FILE = "latents", "file"  # what is stored of an image
LENGTH = 4  # bytes that say how long the header is
HEADER = json.JSONDecoder()


def pack(draft: Draft) -> bytes:
    """A record: the length of a JSON header (little-endian), the header, and the images' bytes one after the other.

    The images are arrays of latents (`Image.encoded`), stored as bfloat16, or picture files.
    """
    header, blobs = [], []
    for part in draft:
        if isinstance(part, Text | Wordings):
            texts = part.texts if isinstance(part, Wordings) else part.text
            weights = {"weights": part.weights} if isinstance(part, Wordings) and part.weights else {}
            header.append({"text": texts, "predict": part.predict, **weights})
        elif isinstance(part, Speaker):
            header.append({"speaker": part.role})
        else:
            blobs.append(_image_bytes(part))
            kind = LATENTS if isinstance(part, Image) else FILE
            header.append({kind: len(blobs[-1]), "generate": part.generate, "via": part.via})
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join([len(head).to_bytes(LENGTH, "little"), head, *blobs])


def unpack(record: bytes, place: str, latents: tuple[int, int, int]) -> Draft:
    """The draft of a record. place: its name in messages. latents: the shape (h, w, D) of an encoded image.

    Raises DocumentError for a record that `pack` has not made.
    """
    try:
        at = LENGTH + int.from_bytes(record[:LENGTH], "little")
        header = record[LENGTH:at].decode()
        parts, end = HEADER.raw_decode(header)
        if end != len(header):
            raise ValueError("its header is too long")
        draft: Draft = []
        for part in parts:
            if "text" in part:
                draft.append(_text(part))
            elif "speaker" in part:
                draft.append(Speaker(part["speaker"]))
            elif LATENTS in part:
                array = np.frombuffer(record, ml_dtypes.bfloat16, math.prod(latents), at).reshape(latents)
                draft.append(Image(array, part["generate"], part["via"], encoded=True))
                at += part[LATENTS]
            else:
                blob = memoryview(record)[at : at + part[FILE]]
                draft.append(_file(part, blob, f"{place}, part {len(draft)}"))
                at += part[FILE]
        if at != len(record):
            raise ValueError(f"it has {len(record)} bytes, not {at}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{place} is damaged ({error}); encode its shard again") from None
    return draft


def _image_bytes(part: Image | StoredImage) -> bytes:
    if isinstance(part, StoredImage):
        with part.open() as file:
            return file.read()
    if not part.encoded:
        raise TypeError("an image that is no file and has not been encoded cannot be stored")
    return part.pixels.astype(ml_dtypes.bfloat16).tobytes()


def _text(part: dict[str, Any]) -> Text | Wordings:
    if isinstance(part["text"], str):
        return Text(part["text"], part["predict"])
    return Wordings(tuple(part["text"]), part["predict"], tuple(part.get("weights", ())))


def _file(part: dict[str, Any], content: memoryview, place: str) -> StoredImage:
    return StoredImage(place, lambda: io.BytesIO(content), part["generate"], part["via"])
