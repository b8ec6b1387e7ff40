"""Drafts <-> bytes: the records of encoded folders."""

import io
import json
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from starflow2_jax.data.documents import DocumentError, Draft, Image, Speaker, StoredImage, Text, Wordings

LATENTS, FILE = "latents", "file"  # what is stored of an image
LENGTH = 4  # bytes that say how long the header is


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
        start = LENGTH + int.from_bytes(record[:LENGTH], "little")
        blobs = memoryview(record)[start:]
        draft: Draft = []
        for part in json.loads(record[LENGTH:start]):
            size = part.get(LATENTS, part.get(FILE, 0))
            draft.append(_part(part, blobs[:size], f"{place}, part {len(draft)}", latents))
            blobs = blobs[size:]
        if len(blobs):
            raise ValueError("bytes are left over")
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


def _part(part: dict[str, Any], blob: memoryview, place: str, latents: Iterable[int]) -> Any:
    if "speaker" in part:
        return Speaker(part["speaker"])
    if isinstance(part.get("text"), str):
        return Text(part["text"], part["predict"])
    if "text" in part:
        return Wordings(tuple(part["text"]), part["predict"], tuple(part.get("weights", ())))
    if LATENTS in part:
        bits = np.frombuffer(blob, "<u2").astype(np.uint32)
        bits <<= 16  # faster than a conversion from bfloat16
        return Image(bits.view(np.float32).reshape(tuple(latents)), part["generate"], part["via"], encoded=True)
    if len(blob) != part[FILE]:
        raise ValueError("it is cut off")
    return StoredImage(place, lambda: io.BytesIO(blob), part["generate"], part["via"])
