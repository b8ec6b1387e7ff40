"""What a stage that trains the pixel decoder feeds it, and the losses of the pictures that it makes."""

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


@dataclass(frozen=True)
class PictureObjective:
    """The input and the losses of the stages `pixels` and (tuned) `pixels_tuned`."""

    networks: Networks
    cfg: CodecStageConfig
    tuned: bool

    def decoder_input(
        self, params: Any, pictures: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Features (B, N, C): the encoder's, with noise on them; if tuned, those made from latents with noise on them.

        Also the layers of the encoder that `loss` compares, (B, N, E) each, of these pictures.
        """
        compared = tuple(self.cfg.losses.perceptual_layers) if self.cfg.losses.perceptual else ()
        (x, layers), share = self.networks.seen(params, pictures, compared), self.cfg.noise
        if self.cfg.noise_drawn:
            own = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
            share = share * own[:, None, None]
        if not self.tuned:
            root_mean_square = jnp.sqrt(jnp.mean(x * x, (1, 2), keepdims=True))
            return jax.lax.stop_gradient(x + share * root_mean_square * drawn(keys, x.shape[1:])), layers
        mean, _ = self.networks.gaussian(params, x)
        latents = mean + share * params["statistics"]["std"] * drawn(keys, mean.shape[1:])
        return jax.lax.stop_gradient(self.networks.features_again(params, latents)), layers

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
