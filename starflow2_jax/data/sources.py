"""The documents that a config names, and the codec and the tokenizer that are fitted to them."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.data import tokenizer
from starflow2_jax.data.digits import Digits
from starflow2_jax.data.documents import CaptionsDropped, Documents, Shown
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.protocol import Source
from starflow2_jax.errors import ConfigError, shown
from starflow2_jax.fields import build
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.stages import Stage

# Keys are a name, a scheme ("name://") or the suffix of a file (".name").
SOURCES: dict[str, type[Source]] = {"digits": Digits, ".jsonl": JsonlDocuments}


def find(where: str) -> type[Source]:
    """The class of the source that `data.source` names. Raises ConfigError."""
    scheme, mark, _ = where.partition("://")
    for key in (where, scheme + mark, Path(where).suffix):
        if key in SOURCES:
            return SOURCES[key]
    raise ConfigError(f"data.source={shown(where)} names no source; there are {', '.join(SOURCES)}")


def open_source(config: Any, channels: int) -> Source:
    """The source that a config names. channels: image files are read with these channels, 1 or 3. Raises UserError."""
    source = find(config.data.source)
    own = {f.name: config.data[f.name] for f in fields(source.Options) if f.name in config.data}
    return source(config.data.source, channels, build(source.Options, own))


def documents(config: Any, stage: Stage, channels: int) -> Documents:
    """The documents of a stage. channels: as in `open_source`. Raises UserError."""
    cfg = config.stages[stage.name]
    seed = stream_seed(config.seed, "documents", stage.name)
    found = open_source(config, channels).for_stage(cfg.shares, seed)
    if cfg.caption_drop:
        found = CaptionsDropped(found, cfg.caption_drop, seed)
    return Shown(found) if stage.words_only else found


def codec_options(config: Any) -> tuple[type[Codec], Any]:
    """The class of the codec that a config names, and its options. Raises ConfigError."""
    values = config.codec.to_dict()
    kind = values.pop("kind")
    if kind not in CODECS:
        raise ConfigError(f"codec.kind is {' or '.join(map(repr, CODECS))}, not {kind!r}")
    return CODECS[kind], build(CODECS[kind].Options, values)


def make_codec(config: Any) -> Codec:
    """The codec that `config.codec` describes, fitted to the source's images if it has statistics. Raises UserError."""
    codec, options = codec_options(config)

    def images() -> Iterator[np.ndarray]:
        yield from open_source(config, options.image_channels).images()

    return codec.make(options, images())


def make_tokenizer(config: Any) -> Any:
    """A `transformers` tokenizer (byte-level BPE) trained on the source's texts. Raises UserError."""
    source = open_source(config, codec_options(config)[1].image_channels)
    return tokenizer.train(list(source.texts()), config.model.vlm.vocabulary)
