"""What a run reads: the documents that its config names, and the codec and tokenizer that fit them."""

from itertools import islice

import numpy as np
from ml_collections import ConfigDict

from starflow2_jax.codecs.patch import Codec, LatentCodec, PatchCodec
from starflow2_jax.data import digits, tokenizer
from starflow2_jax.data.documents import CaptionsDropped, DocumentError, Image, JsonlDocuments, Shown, Text
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import build
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.stages import Stage

FITTED = 1000  # documents that a codec and a tokenizer are fitted to


def documents(config: ConfigDict, stage: Stage, channels: int):
    """The stage's source of documents, by index; the stage's `shares` are of digits. `channels`: of a picture, 1 or 3."""
    cfg = config.stages[stage.name]
    seed = stream_seed(config.seed, "documents", stage.name)
    if config.data.source != "digits":
        source = JsonlDocuments(config.data.source, channels)
        source = CaptionsDropped(source, cfg.caption_drop, seed) if cfg.caption_drop else source
    else:
        shares = {kind: share for kind, share in cfg.shares.items() if share}
        source = digits.DigitDocuments(shares, seed, cfg.caption_drop, config.data.warp)
    return Shown(source) if stage.name == "pretrain" else source


def make_codec(config: ConfigDict) -> Codec:
    """The codec that `config.codec` describes; patches are fitted to the source's images. Raises UserError."""
    values = config.codec.to_dict()
    kind = values.pop("kind")
    if kind == "latents":
        return build(LatentCodec, values)
    if kind != "patch":
        raise ConfigError(f"codec.kind is 'patch' or 'latents', not {kind!r}")
    if config.codec.patch < 1:
        raise ConfigError(f"codec.patch is at least 1, not {config.codec.patch}")
    if config.data.source == "digits":
        if config.codec.get("image_channels", 1) != 1:
            raise ConfigError("the digits are gray; set codec.image_channels to 1")
        images = digits.split("train")[0]
    else:
        images = [p.pixels for p in _parts(config) if isinstance(p, Image) and p.via == "flow"]
    sizes = sorted({i.shape[:2] for i in images})
    if not sizes:
        raise DocumentError(
            f'{config.data.source} has no image via "flow" among its first {FITTED} documents; add some'
        )
    if len(sizes) > 1:
        raise DocumentError(f"{config.data.source} has flow images of sizes {sizes}; bring them to one size")
    if sides := [s for s in sizes[0] if s % config.codec.patch]:
        raise ConfigError(f"codec.patch={config.codec.patch} does not divide an image's side of {sides[0]} pixels")
    return PatchCodec.fit(np.stack(images), config.codec.patch)


def make_tokenizer(config: ConfigDict):
    """A byte-level BPE trained on the source's words."""
    if config.data.source == "digits":
        return digits.make_tokenizer()
    return tokenizer.train([p.text for p in _parts(config) if isinstance(p, Text)], config.model.vlm.vocabulary)


def _parts(config: ConfigDict) -> list[Text | Image]:
    """Of the documents of a JSONL source that a codec and a tokenizer are fitted to."""
    source = JsonlDocuments(config.data.source, config.codec.get("image_channels", LatentCodec.image_channels))
    return [part for document in islice(source, FITTED) for part in document]
