"""The discriminator of a codec's stage: what it says about pictures, both sides' losses, and its update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from starflow2_jax.config.codec import CriticConfig
from starflow2_jax.models.discriminators import FeatureDiscriminator, PatchDiscriminator
from starflow2_jax.training.codec import losses
from starflow2_jax.training.codec.augmentation import augmented
from starflow2_jax.training.codec.networks import Networks


@dataclass(frozen=True, eq=False)
class Adversary:
    """A discriminator with its optimizer. `critic`: its group of a state, as `initial` makes it."""

    networks: Networks
    cfg: CriticConfig
    optimizer: optax.GradientTransformation

    def initial(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, and LeCam's averages."""
        n = self.networks
        if self.cfg.kind == "patch":
            h, w = (side * n.cfg.pixel_decoder.patch for side in n.cfg.grid)
            params = self._patch().init(key, jnp.zeros((1, h, w, n.cfg.pixel_decoder.image_channels)))["params"]
        else:
            features = [jnp.zeros((1, n.tokens, n.encoder.width))] * len(self.cfg.layers)
            params = FeatureDiscriminator().init(key, features)["params"]
        return {"network": params, "averages": {"real": jnp.zeros(()), "made": jnp.zeros(())}}

    def _patch(self) -> PatchDiscriminator:
        return PatchDiscriminator(self.cfg.channels, self.cfg.stages)

    def logits(self, network: dict, params: Any, pictures: jax.Array, key: jax.Array) -> jax.Array:
        """Pictures (B, H, W, 3), augmented with draws from `key` -> logits (B, any number). params: include the
        frozen encoder's.
        """
        if self.cfg.augment:
            pictures = augmented(key, pictures)
        if self.cfg.kind == "patch":
            found: Any = self._patch().apply({"params": network}, pictures)
        else:
            features = self.networks.layers(params, pictures, tuple(self.cfg.layers))
            found = FeatureDiscriminator().apply({"params": network}, [x.astype(jnp.float32) for x in features])
        return found

    def against(
        self,
        critic: dict,
        params: Any,
        made: jax.Array,
        key: jax.Array,
        step: jax.Array,
        direction: jax.Array,
        at_last_layer: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted gradient of the generator's loss with respect to the pictures that were made, and metrics.

        direction: the gradient of the reconstruction loss with respect to the same pictures. at_last_layer: turns a
        gradient with respect to the pictures into one with respect to the last layer's kernel.
        """

        def loss(made: jax.Array) -> jax.Array:
            return losses.generator(self.logits(critic["network"], params, made, key))

        value, gradient = jax.value_and_grad(loss)(made)
        weight = self.cfg.weight * (step >= self.cfg.use_from)
        if self.cfg.adaptive:
            weight = weight * losses.adaptive_weight(at_last_layer(direction), at_last_layer(gradient))
        return weight * gradient, {"generator_loss": value, "generator_weight": jnp.float32(weight)}

    def gradients(
        self, critic: dict, params: Any, real: jax.Array, made: jax.Array, key: jax.Array
    ) -> tuple[dict, dict[str, jax.Array]]:
        """The gradient of the discriminator's loss, and metrics."""

        def loss(network: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
            keys = jax.random.split(jax.random.fold_in(key, 1))
            a, b = (self.logits(network, params, x, k) for x, k in ((real, keys[0]), (made, keys[1])))
            value, on_real, on_made = losses.hinge(a, b), jnp.mean(a), jnp.mean(b)
            if self.cfg.lecam:
                averages = critic["averages"]
                value += self.cfg.lecam * losses.lecam(on_real, on_made, averages["real"], averages["made"])
            return value, {"critic_loss": value, "critic_real": on_real, "critic_made": on_made}

        return jax.grad(loss, has_aux=True)(critic["network"])

    def updated(self, state: Any, gradients: dict, metrics: dict[str, jax.Array]) -> tuple[dict, Any]:
        """The discriminator and its optimizer after a step; the same as before until `train_from`."""
        before = state.critic, state.critic_optimizer
        updates, optimizer = self.optimizer.update(gradients, state.critic_optimizer, state.critic["network"])
        decay = self.cfg.lecam_decay
        averages = {
            name: decay * old + (1 - decay) * metrics[f"critic_{name}"]
            for name, old in state.critic["averages"].items()
        }
        after = {"network": optax.apply_updates(state.critic["network"], updates), "averages": averages}, optimizer
        trains = state.step >= self.cfg.train_from
        return jax.tree.map(lambda old, new: jnp.where(trains, new, old), before, after)
