"""Batches of pictures from the same sources, by the same readers, as those of documents: a row is one picture."""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data import sources
from starflow2_jax.data.documents import Document, DocumentError, Draft, Image, StoredImage, Text, Wordings
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder, RowEncoder
from starflow2_jax.data.preparation import Preparation, unvaried
from starflow2_jax.data.tokenizer import SPECIAL_TOKENS
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.fae import FaeConfig
from starflow2_jax.models.patches import unpatchify
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.sequence import Sequence, Shape


@dataclass(frozen=True)
class OnePicture:
    """Makes of a draft a document of one of its pictures, which is drawn anew each time. The words are left out.

    label: a regular expression with a group; what that group matches in the first text that fits stays, as the
    picture's only word. "": none stays.
    """

    prepare: Preparation
    label: str = ""

    def __call__(self, draft: Draft, rng: np.random.Generator) -> Document:
        """Raises DocumentError."""
        found = [part for part in draft if isinstance(part, Image | StoredImage)]
        if not found:
            raise DocumentError("it holds no picture")
        picture = replace(found[rng.integers(len(found))], via="flow", generate=False)
        return self.prepare([picture, *self._labels(draft)], rng)

    def _labels(self, draft: Draft) -> list[Text]:
        if not self.label:
            return []
        texts = [
            part.texts if isinstance(part, Wordings) else (part.text,)
            for part in draft
            if isinstance(part, Text | Wordings)
        ]
        found = next(filter(None, (re.search(self.label, text) for several in texts for text in several)), None)
        if not found:
            raise DocumentError(f"no text of it has the label {self.label!r}")
        return [Text(found[1])]


class Labels:
    """Takes the place of a tokenizer for documents of a picture and at most one label. A label becomes one token, its
    hash.
    """

    def get_vocab(self) -> dict[str, int]:
        """The special tokens around a picture."""
        return {token: i for i, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """The token of a label, 31 bits."""
        return [zlib.crc32(text.encode()) >> 1]


def row_encoder(networks: FaeConfig, rows: int, labelled: bool = False) -> RowEncoder:
    """Turns documents of one picture, and a label if `labelled`, into rows, which hold its pixels as patches (see
    `pixels`).
    """
    decoder, (h, w) = networks.pixel_decoder, networks.grid
    width = decoder.image_channels * decoder.patch**2
    patches = PatchCodec(_size(networks), decoder.image_channels, decoder.patch, (0.0,) * width, (1.0,) * width)
    return RowEncoder(Encoder(Labels(), patches), Shape(rows, h * w + 3 + labelled, 1))


def abstract_batch(networks: FaeConfig, rows: int) -> Sequence:
    """Shapes and types of a batch without labels."""
    tokens, decoder = networks.grid[0] * networks.grid[1], networks.pixel_decoder

    def array(*sizes: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    length, real = tokens + 3, np.float32
    return Sequence(
        tokens=array(length),
        modality=array(length),
        segments=array(length),
        positions=array(length, 3),
        text_weight=array(length, dtype=real),
        latents=array(1, tokens, decoder.image_channels * decoder.patch**2, dtype=real),
        image_weight=array(1, dtype=real),
    )


def pixels(batch: Sequence, networks: FaeConfig) -> jax.Array:
    """The pictures (B, H, W, C) of a batch, in [-1, 1]."""
    decoder, (h, w) = networks.pixel_decoder, networks.grid
    x = batch.latents[:, 0]
    return unpatchify(x.reshape(len(x), h, w, -1), decoder.patch, decoder.image_channels)


def labels(batch: Sequence, networks: FaeConfig) -> jax.Array:
    """The token (B,) of each picture's label. The batch must be labelled."""
    return batch.tokens[:, networks.grid[0] * networks.grid[1] + 2]


def streams(config: Any, stage: str, networks: FaeConfig) -> list[Stream]:
    """The sources that a stage mixes, opened. Raises UserError."""
    return [
        _stream(each, networks, stream_seed(config.seed, "pictures", stage, each.name))
        for each in sources.named(config, stage)
    ]


def held_out_streams(config: Any, mix: Mapping[str, float], networks: FaeConfig, label: str = "") -> list[Stream]:
    """The sources that an evaluation mixes, opened: the same pictures in every run, each read once and cropped in the
    middle.

    label: as for OnePicture. Raises UserError.
    """
    return [
        replace(_stream(plain, networks, stream_seed(0, "held out pictures", each.name), label), once=True)
        for each in sources.mixed(config, mix)
        for plain in [replace(each, config=unvaried(each.config))]
    ]


def _stream(named: sources.Named, networks: FaeConfig, seed: int, label: str = "") -> Stream:
    source = named.open()
    if source.codec():
        raise ConfigError(
            f"data.sources.{named.name}: {named.config.path} holds latents, and a codec is trained on pictures; name "
            f"their source"
        )
    reader = ImageReader(networks.pixel_decoder.image_channels, _size(networks))
    prepare: Any = OnePicture(Preparation(named.config, reader), label)
    return Stream(named.name, named.weight, source, prepare, seed)


def _size(networks: FaeConfig) -> tuple[int, int]:
    side, (h, w) = networks.pixel_decoder.patch, networks.grid
    return h * side, w * side
