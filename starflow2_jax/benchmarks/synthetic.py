"""Synthetic documents for configs whose data are not here: captions of common words, images of noise."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from ml_collections import ConfigDict

from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.codecs.protocol import Options
from starflow2_jax.data.sources import codec_options
from starflow2_jax.stages import Stage

DOCUMENTS = 64
WORDS = (
    "a the small large red blue green old new house tree river road bird dog cat boat cloud stone field under over "
    "beside"
)


def use(config: Any, stage: Stage, folder: Path, words: int = 48) -> None:
    """Write a JSONL file of DOCUMENTS documents with captions of `words` words into `folder`, and make it the config's
    source.

    The parts that the stage trains on are marked. Where the codec is a folder that the config does not name, images are
    latents, as the shards of `starflow2 encode` have them. Raises ConfigError for a config without a usable codec.
    """
    if config.codec.get("path") == "":
        sizes = dict(grid=config.codec.grid, channels=config.codec.channels, shift=0.0, scale=1.0)
        with config.unlocked():
            config.codec = ConfigDict(dict(kind=LatentCodec.kind, **sizes))
    rng = np.random.default_rng(0)
    codec, options = codec_options(config)
    shape = cast(Options, options).image_shape(config.model.grid)
    lines = []
    for i in range(DOCUMENTS):
        pixels = rng.standard_normal(shape).astype(np.float32)
        np.save(folder / f"{i}.npy", np.tanh(pixels) if codec.is_pixels else pixels)
        caption = " ".join(rng.choice(WORDS.split(), words))
        image = {"image": f"{i}.npy"}
        makes = stage.image_loss and (i % 2 == 0 or not stage.text_loss)
        parts = (
            [{"text": caption}, {**image, "generate": True}] if makes else [image, {"text": caption, "predict": True}]
        )
        lines.append(json.dumps(parts))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with config.unlocked():
        config.data.source = str(path)
