"""The codecs there are, by the `kind` that a config's `codec` section and a checkpoint's codec.json name."""

from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.codecs.protocol import Codec

CODECS: dict[str, type[Codec]] = {codec.kind: codec for codec in (PatchCodec, LatentCodec)}
