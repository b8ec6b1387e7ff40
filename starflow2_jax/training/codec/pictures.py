"""Batches of pictures from the same sources, by the same readers, as those of documents: a row is one picture."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data import sources
from starflow2_jax.data.documents import Document, DocumentError, Draft, Image, StoredImage
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder, RowEncoder
from starflow2_jax.data.preparation import Preparation
from starflow2_jax.data.tokenizer import SPECIAL_TOKENS
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.fae import FaeConfig
from starflow2_jax.models.patches import unpatchify
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.sequence import Sequence, Shape


@dataclass(frozen=True)
class OnePicture:
    """Makes of a draft a document of one of its pictures, which is drawn anew each time. The words are left out."""

    prepare: Preparation

    def __call__(self, draft: Draft, rng: np.random.Generator) -> Document:
        """Raises DocumentError."""
        found = [part for part in draft if isinstance(part, Image | StoredImage)]
        if not found:
            raise DocumentError("it holds no picture")
        return self.prepare([replace(found[rng.integers(len(found))], via="flow", generate=False)], rng)


class NoWords:
    """Stands in for a tokenizer where documents hold pictures alone."""

    def get_vocab(self) -> dict[str, int]:
        """The special tokens around a picture."""
        return {token: i for i, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """Raises ValueError: there are no words."""
        raise ValueError(f"a document of pictures holds the text {text!r}")


def row_encoder(networks: FaeConfig, rows: int) -> RowEncoder:
    """Turns documents of one picture into rows, which hold its pixels as patches (see `pixels`)."""
    decoder, (h, w) = networks.pixel_decoder, networks.grid
    width = decoder.image_channels * decoder.patch**2
    patches = PatchCodec(_size(networks), decoder.image_channels, decoder.patch, (0.0,) * width, (1.0,) * width)
    return RowEncoder(Encoder(NoWords(), patches), Shape(rows, h * w + 3, 1))


def pixels(batch: Sequence, networks: FaeConfig) -> jax.Array:
    """The pictures (B, H, W, C) of a batch, in [-1, 1]."""
    decoder, (h, w) = networks.pixel_decoder, networks.grid
    x = batch.latents[:, 0]
    return unpatchify(x.reshape(len(x), h, w, -1), decoder.patch, decoder.image_channels)


def streams(config: Any, stage: str, networks: FaeConfig) -> list[Stream]:
    """The sources that a stage mixes, opened. Raises UserError."""
    return [
        _stream(each, networks, stream_seed(config.seed, "pictures", stage, each.name))
        for each in sources.named(config, stage)
    ]


def _stream(named: sources.Named, networks: FaeConfig, seed: int) -> Stream:
    source = named.open()
    if source.codec():
        raise ConfigError(
            f"data.sources.{named.name}: {named.config.path} holds latents, and a codec is trained on pictures; name their source"
        )
    reader = ImageReader(networks.pixel_decoder.image_channels, _size(networks))
    prepare: Any = OnePicture(Preparation(named.config, reader))
    return Stream(named.name, named.weight, source, prepare, seed)


def _size(networks: FaeConfig) -> tuple[int, int]:
    side, (h, w) = networks.pixel_decoder.patch, networks.grid
    return h * side, w * side
