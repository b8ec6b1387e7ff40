"""The codec of a plan: its sizes alone, from a codec's folder or from an experiment that trains one."""

from pathlib import Path
from typing import Any

import jax

from starflow2_jax.codecs.fae import FaeCodec, read_fae
from starflow2_jax.codecs.folder import DESCRIPTION
from starflow2_jax.config import loading as configs
from starflow2_jax.config.codec import encoder_config, networks_config
from starflow2_jax.data.sources import codec_options
from starflow2_jax.errors import ConfigError
from starflow2_jax.training.codec.networks import Networks


def planned_codec(config: Any, named: str) -> FaeCodec:
    """The codec that a STARFlow2 config takes, with shapes in the place of weights.

    named: a codec's folder, or an experiment that trains a codec. Raises ConfigError if it does not fit the config.
    """
    kind, options = codec_options(config)
    if kind is not FaeCodec:
        raise ConfigError(
            f"--codec plans the networks that encode images, but codec.kind is {config.codec.kind!r}, which has none; "
            f"leave out --codec"
        )
    folder = Path(named)
    codec = read_fae(folder) if (folder / DESCRIPTION).is_file() else _untrained(named)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(codec.weights))
    return FaeCodec.restored(codec.description(), shapes).fitted(options)


def _untrained(experiment: str) -> FaeCodec:
    c: Any = configs.load(experiment, kinds=(configs.CODEC,))
    n = Networks(networks_config(c), c.encoder.kind, encoder_config(c))
    names = ("encoder", "latent_encoder", "feature_decoder", "pixel_decoder")
    weights = jax.eval_shape(lambda: n.initial(jax.random.key(0), names))
    D = n.cfg.channels
    return FaeCodec(n.cfg, n.encoder_kind, n.encoder, n.cfg.grid, (0.0,) * D, (1.0,) * D, weights)
