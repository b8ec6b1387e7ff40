"""The networks of a codec while it is trained: its groups of parameters by name, and what each computes."""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from starflow2_jax.codecs.fae import FaeCodec
from starflow2_jax.models.fae import FaeConfig, FeatureDecoder, LatentEncoder, PixelDecoder
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.models.layers import dense


class Unmasking(nn.Module):
    """The linear map by which a masked encoder is trained: features -> pixels of each token's square."""

    cfg: FaeConfig

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Features (B, N, C) -> (B, N, image channels patch^2)."""
        part = self.cfg.pixel_decoder
        return dense(part.image_channels * part.patch**2, "pixels", True, "float32")(features)


@dataclass(frozen=True)
class Networks:
    """A codec's networks. `params`: groups of parameters, of which each method reads one."""

    cfg: FaeConfig
    encoder_kind: str  # a key of ENCODERS
    encoder: Any  # the config of that row

    @property
    def tokens(self) -> int:
        """N."""
        return self.cfg.grid[0] * self.cfg.grid[1]

    def initial(self, key: jax.Array, groups: tuple[str, ...]) -> dict[str, Any]:
        """Fresh parameters of these groups. Each depends on the key and its own name alone."""
        features = jnp.zeros((1, self.tokens, self.cfg.features))
        latents = jnp.zeros((1, self.tokens, self.cfg.channels))
        make = {
            "encoder": lambda key: ENCODERS[self.encoder_kind].init(self.encoder, key),
            "unmasking": lambda key: Unmasking(self.cfg).init(key, features)["params"],
            "latent_encoder": lambda key: LatentEncoder(self.cfg).init(key, features)["params"],
            "feature_decoder": lambda key: FeatureDecoder(self.cfg).init(key, latents)["params"],
            "pixel_decoder": lambda key: PixelDecoder(self.cfg).init(key, features)["params"],
            "statistics": lambda _: {"mean": jnp.zeros(self.cfg.channels), "std": jnp.ones(self.cfg.channels)},
        }
        return {name: make[name](jax.random.fold_in(key, list(make).index(name))) for name in groups}

    def features(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Pictures (B, H, W, 3) -> the encoder's features (B, N, C) in fp32."""
        found = ENCODERS[self.encoder_kind].features(self.encoder, params["encoder"], pixels, self.cfg.grid)
        return found.astype(jnp.float32)

    def layers(self, params: Any, pixels: jax.Array, layers: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """Pictures (B, H, W, 3) -> outputs (B, N, E) of these layers of the encoder."""
        return self.seen(params, pixels, layers)[1]

    def seen(self, params: Any, pixels: jax.Array, layers: tuple[int, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`features` and `layers` in one pass. An encoder that does not give its layers takes no numbers."""
        if not layers:
            return self.features(params, pixels), ()
        row = ENCODERS[self.encoder_kind]
        assert row.layers is not None, "the config's checks allow no such encoder"
        found, outputs = row.layers(self.encoder, params["encoder"], pixels, self.cfg.grid, layers)
        return found.astype(jnp.float32), outputs

    def unmasked(self, params: Any, features: jax.Array) -> jax.Array:
        """See Unmasking."""
        found: Any = Unmasking(self.cfg).apply({"params": params["unmasking"]}, features)
        return found

    def gaussian(self, params: Any, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (B, N, C) -> mean and log-variance (B, N, D)."""
        found: Any = LatentEncoder(self.cfg).apply({"params": params["latent_encoder"]}, features)
        return found

    def features_again(self, params: Any, latents: jax.Array) -> jax.Array:
        """Latents (B, N, D) -> features (B, N, C) in fp32."""
        found: Any = FeatureDecoder(self.cfg).apply({"params": params["feature_decoder"]}, latents)
        return found.astype(jnp.float32)

    def pictures(self, params: Any, features: jax.Array) -> jax.Array:
        """Features (B, N, C) -> pictures (B, H, W, 3)."""
        found: Any = PixelDecoder(self.cfg).apply({"params": params["pixel_decoder"]}, features)
        return found


def networks_of(codec: FaeCodec) -> Networks:
    """The networks of a codec, for its grid."""
    return Networks(replace(codec.networks, grid=codec.grid), codec.encoder_kind, codec.encoder)
