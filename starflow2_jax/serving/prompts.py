"""The prompt of a request: its turns become a document, the document features, the features pieces to read in order."""

import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from starflow2_jax import sequence
from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.images import as_pillow
from starflow2_jax.data.tokenizer import chat
from starflow2_jax.sampling.engine import Sampler

NOTHING: Mapping[str, Any] = MappingProxyType({})
Turns = list[tuple[str, Document]]  # a conversation: the role and the content of each message


def prompt(sampler: Sampler, turns: Turns, variables: Mapping[str, Any] = NOTHING) -> Document:
    """The document that the answer continues: the turns in the tokenizer's chat template, which reads `variables`.

    Without a template, the turns are joined as they are, with <|im_end|> after each answer of the model.
    """
    if sampler.tokenizer.chat_template:
        return chat(sampler.tokenizer, turns, **variables)
    parts = [[*said, Text("<|im_end|>")] if role == "assistant" else said for role, said in turns]
    return [part for said in parts for part in said]


def pieces(features: dict[str, np.ndarray], most: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields a document's features in pieces of `most` positions, or of more where a cut would split an image.

    To read the pieces in order is to read the document. The rotary positions of each piece begin at 0.
    """
    modality, begin = features["modality"], 0
    # Whether a cut after position t would split an image. Two images are never neighbours: markers are between them.
    inside = (modality[1:] == modality[:-1]) & (modality[1:] != sequence.TEXT)
    while begin < len(modality):
        end = min(begin + most, len(modality))
        while end < len(modality) and inside[end - 1]:
            end += 1
        yield _piece(features, begin, end)
        begin = end


def _piece(features: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    def images(kind: int) -> list[int]:
        """The number of images of this kind that start before `begin`, and before `end`."""
        of_kind = features["modality"] == kind
        starts = np.cumsum(np.diff(of_kind.astype(np.int8), prepend=0) == 1)
        return [int(starts[t - 1]) if t else 0 for t in (begin, end)]

    found = {name: features[name][begin:end] for name in ("tokens", "modality", "text_weight", "positions")}
    found["positions"] = found["positions"] - found["positions"][0, 0]
    first, last = images(sequence.FLOW)
    found |= {name: features[name][first:last] for name in ("latents", "image_weight")}
    if "patches" in features:
        first, last = images(sequence.VIT)
        mine = (features["image"] >= first) & (features["image"] < last)
        found |= {name: features[name][mine] for name in ("patches", "coordinates", "image", "window")}
        for name in ("image", "window"):
            found[name] = found[name] - found[name].min(initial=2**31 - 1)
    return found


def identity(turns: Turns) -> tuple:
    """A key that is equal for conversations with the same roles, texts and images, which are compared as 8-bit
    pixels.
    """
    return tuple((role, _said(document)) for role, document in turns)


def _said(document: Document) -> tuple:
    parts: list[tuple] = []
    for part in document:
        if isinstance(part, Image):
            seen = part.pixels if part.encoded else as_pillow(part.pixels)
            digest = hashlib.sha256(seen.tobytes()).digest()
            parts.append((part.via, part.pixels.shape, digest))
        elif parts and parts[-1][0] == "text":
            parts[-1] = ("text", parts[-1][1] + part.text)
        elif part.text:
            parts.append(("text", part.text))
    return tuple(parts)
