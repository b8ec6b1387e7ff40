"""The table of codecs. Its keys are the `kind` in a config's `codec` section and in a checkpoint's codec.json."""

from starflow2_jax.codecs.fae import FaeCodec
from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.codecs.protocol import Codec

CODECS: dict[str, type[Codec]] = {codec.kind: codec for codec in (PatchCodec, LatentCodec, FaeCodec)}
