"""The table of sources, and the sources that a config names."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.data import tokenizer
from starflow2_jax.data.digits import Digits
from starflow2_jax.data.documents import StoredImage
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.scenes.source import Scenes
from starflow2_jax.errors import ConfigError, shown
from starflow2_jax.fields import Variant, build, joined
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.stages import Stage

# Keys are a name, a scheme ("name://"), the suffix of a file (".name"), or a file that a folder holds ("/name").
SOURCES: dict[str, type[Source]] = {"digits": Digits, ".jsonl": JsonlDocuments, "scenes": Scenes}
ALONE = "documents"  # the name of the source that `data.source` gives


def find(path: str) -> type[Source]:
    """The class of the source that a `path` in a config names. Raises ConfigError."""
    scheme, mark, _ = path.partition("://")
    held = [key for key in SOURCES if key.startswith("/") and Path(path + key).is_file()]
    for key in (path, scheme + mark, Path(path).suffix, *held):
        if key in SOURCES:
            return SOURCES[key]
    raise ConfigError(f"the path {shown(path)} names no source; there are {', '.join(SOURCES)}")


@cache
def source_class(path: str | None) -> type:
    """The keys of `data.sources.NAME`: those of all sources and those of the one at `path`. Raises ConfigError."""
    return joined(SourceConfig, find(path).Options) if path else SourceConfig


VARIANT = Variant("path", source_class, lambda: [source.Options for source in SOURCES.values()])


@dataclass(frozen=True)
class Named:
    """A source of a config under its name. weight: its share of a stage's documents, beside those of the other sources."""

    name: str
    weight: float
    config: SourceConfig  # with the keys of its own kind of source

    def open(self) -> Source:
        """Raises UserError."""
        kind = find(self.config.path)
        own = {field.name: getattr(self.config, field.name) for field in fields(kind.Options)}
        return kind(self.config.path, kind.Options(**own))


def named(config: Any, stage: str | None = None) -> list[Named]:
    """The sources of a config in the order of their names: those that a stage mixes, or (None) all of them.

    `data.source`, where it is given, stands for all of them in every stage.
    """
    if config.data.source is not None:
        values = {ALONE: {"path": config.data.source}}
        mix = {ALONE: 1.0}
    else:
        values = {name: dict(each) for name, each in config.data.sources.items()}
        mix = dict(config.stages[stage].mix) if stage else {}
    weights = mix or dict.fromkeys(values, 1.0)
    return [
        Named(
            name, weight, build(source_class(values[name]["path"]), VARIANT.own(values[name]), f"data.sources.{name}")
        )
        for name, weight in sorted(weights.items())
        if weight > 0
    ]


def streams(config: Any, stage: Stage, codec: Codec) -> list[Stream]:
    """The sources that a stage mixes, opened. Raises UserError."""
    height, width, _ = codec.image_shape
    images = ImageReader(codec.image_channels, (height, width), latents=not codec.is_pixels)
    return [
        Stream(
            name=each.name,
            weight=each.weight,
            source=each.open(),
            prepare=Preparation(each.config, images, drops=stage.image_loss, words_only=stage.words_only),
            seed=stream_seed(config.seed, "documents", stage.name, each.name),
        )
        for each in named(config, stage.name)
    ]


def codec_options(config: Any) -> tuple[type[Codec], Any]:
    """The class of the codec that a config names, and its options. Raises ConfigError."""
    values = config.codec.to_dict()
    kind = values.pop("kind")
    if kind not in CODECS:
        raise ConfigError(f"codec.kind is {' or '.join(map(repr, CODECS))}, not {kind!r}")
    return CODECS[kind], build(CODECS[kind].Options, values)


def make_codec(config: Any) -> Codec:
    """The codec that `config.codec` describes, fitted to the sources' images if it has statistics. Raises UserError."""
    codec, options = codec_options(config)
    height, width, _ = options.image_shape(config.model.grid)

    def images() -> Iterator[np.ndarray]:
        for source in named(config):
            size = None if source.config.crop == "none" else (height, width)
            reader = ImageReader(options.image_channels, size, latents=not codec.is_pixels)
            for image in source.open().images():
                yield reader(image).pixels if isinstance(image, StoredImage) else image.pixels

    return codec.make(options, images())


def make_tokenizer(config: Any) -> Any:
    """A `transformers` tokenizer (byte-level BPE) trained on the sources' texts. Raises UserError."""
    corpus = [text for source in named(config) for text in source.open().texts()]
    return tokenizer.train(corpus, config.model.vlm.vocabulary)
