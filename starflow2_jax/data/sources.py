"""The table of sources, and the sources that a config names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from starflow2_jax.codecs.fingerprint import fingerprint
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.data import tokenizer
from starflow2_jax.data.digits import Digits
from starflow2_jax.data.documents import Image, StoredImage
from starflow2_jax.data.encoded import EncodedDocuments
from starflow2_jax.data.huggingface import HuggingFaceDocuments
from starflow2_jax.data.images import BUCKETS, ImageReader, locate
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.preparation import Preparation, SourceConfig, unvaried
from starflow2_jax.data.protocol import Source, readable
from starflow2_jax.data.scenes.source import Scenes
from starflow2_jax.data.tfds import TfdsDocuments
from starflow2_jax.errors import ConfigError, shown
from starflow2_jax.fields import Variant, build, joined
from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.stages import Stage
from starflow2_jax.text_files import reason

# Keys are a name, a scheme ("name://"), the suffix of a file (".name"), or a file that a folder holds ("/name").
SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "scenes": Scenes,
    ".jsonl": JsonlDocuments,
    ".json": JsonlDocuments,
    "tfds://": TfdsDocuments,
    "/index.json": EncodedDocuments,
    "/state.json": HuggingFaceDocuments,
    "/dataset_dict.json": HuggingFaceDocuments,
}
HUGE = 2**14  # side in pixels of a picture that every vision tower scales down
ALONE = "documents"  # the name of the source that `data.source` gives


def find(path: str) -> type[Source]:
    """The class of the source that a `path` in a config names. Raises ConfigError."""
    scheme, mark, _ = path.partition("://")
    for key in (path, scheme + mark, Path(path).suffix):
        if key in SOURCES:
            return SOURCES[key]
    if not mark or scheme in ("file", *BUCKETS):
        folder = locate(path, epath.Path(), "path")
        try:
            held = [key for key in SOURCES if key.startswith("/") and (folder / key[1:]).exists()]
        except Exception as error:  # each kind of bucket raises its own
            raise ConfigError(f"the path {shown(path)} cannot be opened ({reason(error)})") from None
        if held:
            return SOURCES[held[0]]
    raise ConfigError(f"the path {shown(path)} names no source; there are {', '.join(SOURCES)}")


@cache
def source_class(path: str | None) -> type:
    """The keys of `data.sources.NAME`: those of all sources and those of the one at `path`. Raises ConfigError."""
    return joined(SourceConfig, find(path).Options) if path else SourceConfig


VARIANT = Variant("path", source_class, lambda: [source.Options for source in SOURCES.values()])


@dataclass(frozen=True)
class Named:
    """A source of a config under its name. weight: its share of a stage's documents, beside those of the other
    sources.
    """

    name: str
    weight: float
    config: SourceConfig  # with the keys of its own kind of source

    def open(self) -> Source:
        """Raises UserError."""
        kind = find(self.config.path)
        own = {field.name: getattr(self.config, field.name) for field in fields(kind.Options)}
        return kind(self.config.path, kind.Options(**own))


def named(config: Any, stage: str | None = None) -> list[Named]:
    """The sources of a config in the order of their names: those that a stage mixes, or (None) all that are not held
    out.

    `data.source`, where it is given, stands for all of them in every stage.
    """
    if config.data.source is not None:
        return [_named(ALONE, 1.0, {"path": config.data.source})]
    mix = dict(config.stages[stage].mix) if stage else {}
    return mixed(config, mix or {name: 1.0 for name in config.data.sources if name not in held_out(config)})


def mixed(config: Any, mix: Mapping[str, float]) -> list[Named]:
    """The sources of `data.sources` that a mix gives a weight, in the order of their names."""
    return [_named(name, weight, dict(config.data.sources[name])) for name, weight in sorted(mix.items()) if weight > 0]


def held_out(config: Any) -> set[str]:
    """The sources that evaluations mix and no stage does: nothing is trained on them or fitted to them."""
    read = {name for stage in config.stages.values() for name in stage.mix}
    return {name for each in config.evals.values() for name in getattr(each, "mix", None) or ()} - read


def _named(name: str, weight: float, values: dict[str, Any]) -> Named:
    return Named(name, weight, build(source_class(values["path"]), VARIANT.own(values), f"data.sources.{name}"))


def streams(
    config: Any, stage: Stage, codec: Codec, tokenizer: Any, vision: VisionConfig | None = None
) -> list[Stream]:
    """The sources that a stage mixes, opened.

    tokenizer: lays out conversations. vision: the vision tower, whose sizes let large pictures be decoded smaller.
    Raises UserError.
    """
    images = _reader(codec, vision)
    return [
        Stream(
            name=each.name,
            weight=each.weight,
            source=_of_codec(each, codec),
            prepare=Preparation(each.config, images, stage.image_loss, stage.words_only, tokenizer),
            seed=stream_seed(config.seed, "documents", stage.name, each.name),
        )
        for each in named(config, stage.name)
    ]


def _of_codec(named: Named, codec: Codec) -> Source:
    """The source, opened. Raises ConfigError if it holds latents of another codec."""
    source = named.open()
    if (made := source.encoded_by()) and made != fingerprint(codec):
        raise ConfigError(
            f"data.sources.{named.name}: {named.config.path} holds latents of another codec than this run's; encode "
            f"its source again with --codec and this run's directory"
        )
    return source


def held_out_streams(config: Any, mix: Mapping[str, float], stage: Stage, codec: Codec, tokenizer: Any) -> list[Stream]:
    """The sources that an evaluation mixes, opened: the same documents in every run, each read once, with nothing left
    out and all pictures cropped in the middle. Raises UserError."""
    return [
        Stream(
            name=each.name,
            weight=each.weight,
            source=_of_codec(each, codec),
            prepare=Preparation(unvaried(each.config), _reader(codec, None), False, stage.words_only, tokenizer),
            seed=stream_seed(0, "held out", each.name),
            once=True,
        )
        for each in mixed(config, mix)
    ]


def _reader(codec: Codec, vision: VisionConfig | None) -> ImageReader:
    height, width, _ = codec.image_shape
    seen = max(vision.resized((HUGE, HUGE))) if vision else None
    return ImageReader(codec.image_channels, (height, width), latents=not codec.is_pixels, seen=seen)


def codec_options(config: Any) -> tuple[type[Codec], Any]:
    """The class of the codec that a config names, and its options. Raises ConfigError."""
    values = config.codec.to_dict()
    kind = values.pop("kind")
    if kind not in CODECS:
        raise ConfigError(f"codec.kind must be {' or '.join(map(repr, CODECS))}, not {kind!r}")
    return CODECS[kind], build(CODECS[kind].Options, values)


def make_codec(config: Any) -> Codec:
    """The codec that has encoded a source of the config; else the codec that `config.codec` describes, fitted to the
    sources' images if it has statistics. Raises UserError if `config.codec` names the folder of another than the
    source's.
    """
    opened = [(each.config, each.open()) for each in named(config)]
    brought = next(filter(None, (source.codec() for _, source in opened)), None)
    codec, options = codec_options(config)
    if brought and not getattr(options, "path", ""):
        return brought
    height, width, _ = options.image_shape(config.model.grid)

    def images() -> Iterator[np.ndarray]:
        for own, source in opened:
            size = None if own.crop == "none" else (height, width)
            reader = ImageReader(options.image_channels, size, latents=not codec.is_pixels)
            yield from readable(source.images(), partial(_pixels, reader))

    made = codec.make(options, images())
    if brought and fingerprint(brought) != fingerprint(made):
        raise ConfigError(
            f"a source holds latents of another codec than that of codec.path={options.path}; encode it again with "
            f"--codec {options.path}, or leave codec.path out"
        )
    return made


def _pixels(reader: ImageReader, image: Image | StoredImage) -> np.ndarray:
    return reader(image).pixels if isinstance(image, StoredImage) else image.pixels


def make_tokenizer(config: Any) -> Any:
    """A `transformers` tokenizer (byte-level BPE) trained on the sources' texts. Raises UserError."""
    corpus = [text for source in named(config) for text in source.open().texts()]
    return tokenizer.train(corpus, config.model.vlm.vocabulary)
