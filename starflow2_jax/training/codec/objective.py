"""What a stage that makes pictures feeds the pixel decoder, and the losses of the pictures that it makes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.config.codec import CodecStageConfig
from starflow2_jax.models.lpips import Lpips
from starflow2_jax.training.codec import losses
from starflow2_jax.training.codec.networks import Networks


def drawn(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal noise (B, *shape), of which each row depends on its own key alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def through_latents(networks: Networks, params: Any, x: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features (B, N, C) that are made again from latents drawn for the features x, and their KL () in nats a token."""
    mean, log_variance = networks.gaussian(params, x)
    latents = mean + jnp.exp(0.5 * log_variance) * drawn(keys, mean.shape[1:])
    return networks.features_again(params, latents), jnp.mean(jnp.sum(losses.kl(mean, log_variance), -1))


@dataclass(frozen=True)
class PictureObjective:
    """The decoder's input and the losses of a stage that makes pictures."""

    networks: Networks
    cfg: CodecStageConfig
    name: str  # pixels, pixels_tuned or vae

    def seen(self, params: Any, pictures: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The encoder's features (B, N, C), and its layers that `loss` compares, (B, N, E) each."""
        compared = tuple(self.cfg.losses.perceptual_layers) if self.cfg.losses.perceptual else ()
        return self.networks.seen(params, pictures, compared)

    def decoder_input(self, params: Any, x: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (B, N, C) for the features x, and the KL () of the latents in nats a token (0 unless vae).

        pixels: x with noise. pixels_tuned: made from the means of latents, with noise on these. vae: made from
        latents that are drawn.
        """
        if self.name == "vae":
            return through_latents(self.networks, params, x, keys)
        share, none = self.cfg.noise, jnp.zeros(())
        if self.cfg.noise_drawn:
            own = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
            share = share * own[:, None, None]
        if self.name == "pixels":
            root_mean_square = jnp.sqrt(jnp.mean(x * x, (1, 2), keepdims=True))
            return x + share * root_mean_square * drawn(keys, x.shape[1:]), none
        mean, _ = self.networks.gaussian(params, x)
        latents = mean + share * params["statistics"]["std"] * drawn(keys, mean.shape[1:])
        return self.networks.features_again(params, latents), none

    def loss(
        self, made: jax.Array, real: jax.Array, layers: tuple[jax.Array, ...], params: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss () of pictures, and its terms without their weights. layers: of `real`, as `decoder_input` gives
        them.
        """
        w, terms = self.cfg.losses, {}
        if w.l1:
            terms["l1"] = losses.l1(made, real)
        if w.l2:
            terms["l2"] = losses.l2(made, real)
        if w.perceptual:
            own = self.networks.layers(params, made, tuple(w.perceptual_layers))
            terms["perceptual"] = losses.feature_distance(own, layers)
        if w.lpips:
            distances: Any = Lpips().apply({"params": params["lpips"]}, made, real)
            terms["lpips"] = jnp.mean(distances)
        total = sum((getattr(w, name) * value for name, value in terms.items()), jnp.zeros(()))
        return total, {f"{name}_loss": value for name, value in terms.items()}
