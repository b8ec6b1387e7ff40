"""The training step of a codec's stage: one pure function, with a second optimizer where there is a discriminator."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from starflow2_jax.config.codec import CodecStageConfig
from starflow2_jax.models.patches import patchify
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import CodecStage
from starflow2_jax.training.codec import losses
from starflow2_jax.training.codec.adversary import Adversary
from starflow2_jax.training.codec.networks import Networks
from starflow2_jax.training.codec.objective import PictureObjective, through_latents
from starflow2_jax.training.codec.pictures import pixels
from starflow2_jax.training.step import in_parts
from starflow2_jax.training.task import State


class CodecState(State):
    """A stage's state. `params` holds all groups of its row of CODEC_STAGES, trained or not."""

    ema: dict  # moving average of the groups that are trained
    optimizer: optax.OptState
    critic: dict  # "network": the discriminator's parameters, "averages": LeCam's; {}: there is none
    critic_optimizer: optax.OptState


# What a micro-batch gives: gradients of the trained groups, those of the discriminator, and metrics; all are means over
# its pictures.
Found = tuple[dict, dict, dict[str, jax.Array]]


def make_step(
    networks: Networks,
    stage: CodecStage,
    cfg: CodecStageConfig,
    optimizer: optax.GradientTransformation,
    adversary: Adversary | None,
) -> Callable[[CodecState, Any, Sequence], tuple[CodecState, dict[str, jax.Array]]]:
    """The step: (state, frozen, batch) -> (state, metrics). It is not compiled.

    "loss" is without the generator's loss, so that it stays comparable over the whole stage. Micro-batches
    (`cfg.accumulate`) change the result only where there is a discriminator: the adaptive weight and the augmentation
    are those of a micro-batch.
    """

    def step(state: CodecState, frozen: Any, batch: Sequence):
        moving = stage.trained(state.params)
        rest = frozen | {name: tree for name, tree in state.params.items() if name not in moving}

        def found(pictures: jax.Array, keys: jax.Array) -> Found:
            if stage.pixels:
                objective = PictureObjective(networks, cfg, stage.name)
                return picture_gradients(objective, adversary, moving, rest, state.critic, pictures, keys, state.step)
            loss = feature_loss if stage.name == "features" else masked_loss
            gradients, metrics = jax.grad(loss, has_aux=True)(moving, networks, cfg, rest, pictures, keys)
            return gradients, {}, metrics

        keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(batch.tokens))
        pictures = pixels(batch, networks.cfg)
        gradients, critics, metrics = averaged(found, pictures, keys, cfg.accumulate)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, moving)
        moving: Any = optax.apply_updates(moving, updates)
        decay = jnp.minimum(cfg.ema, (1 + state.step) / (10 + state.step))
        new = state.replace(
            step=state.step + 1,
            params=state.params | moving,
            ema=jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, moving),
            optimizer=optimizer_state,
        )
        if adversary:
            critic, critic_optimizer = adversary.updated(state, critics, metrics)
            new = new.replace(critic=critic, critic_optimizer=critic_optimizer)
        tokens = jnp.float32(len(pictures) * networks.tokens)
        return new, metrics | {"grad_norm": optax.tree.norm((gradients, critics)), "tokens": tokens}

    return step


def averaged(found: Callable[[jax.Array, jax.Array], Found], pictures: jax.Array, keys: jax.Array, parts: int) -> Found:
    """The mean of what `found` gives for `parts` micro-batches of pictures and their random keys, one after the
    other.
    """
    if parts == 1:
        return found(pictures, keys)
    both: Any = pictures, keys
    cut: Any = in_parts(both, parts)
    shapes = jax.eval_shape(found, *jax.tree.map(lambda x: x[0], cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(carry: Found, part: tuple) -> tuple[Found, None]:
        return jax.tree.map(jnp.add, carry, found(*part)), None

    return jax.tree.map(lambda x: x / parts, jax.lax.scan(add, zero, cut)[0])


def feature_loss(
    moving: dict, networks: Networks, cfg: CodecStageConfig, rest: dict, pictures: jax.Array, keys: jax.Array
) -> tuple[jax.Array, dict]:
    """|x^ - x|^2 + beta KL: the mean over features, and nats summed over a token's channels and averaged over
    tokens.
    """
    x = networks.features(rest, pictures)
    again, kl = through_latents(networks, moving, x, keys)
    error = losses.l2(again, x)
    loss = error + cfg.beta * kl
    return loss, {"loss": loss, "feature_loss": error, "kl_loss": kl}


def masked_loss(
    moving: dict, networks: Networks, cfg: CodecStageConfig, rest: dict, pictures: jax.Array, keys: jax.Array
) -> tuple[jax.Array, dict]:
    """Mean squared error of the masked squares of pixels (SimMIM, arXiv 2111.09886; masked pixels are 0)."""
    side, (h, w) = networks.cfg.pixel_decoder.patch, networks.cfg.grid
    masked = jax.vmap(lambda key: jax.random.uniform(key, (h, w)) < cfg.masked)(keys)
    hidden = jnp.repeat(jnp.repeat(masked, side, 1), side, 2)[..., None]
    made = networks.unmasked(moving, networks.features(moving, jnp.where(hidden, 0.0, pictures)))
    squares = jnp.mean((made - patchify(pictures, side).reshape(made.shape)) ** 2, -1)
    loss = jnp.sum(squares * masked.reshape(squares.shape)) / jnp.maximum(jnp.sum(masked), 1)
    return loss, {"loss": loss, "masked_loss": loss}


def picture_gradients(
    objective: PictureObjective,
    adversary: Adversary | None,
    moving: dict,
    rest: dict,
    critic: dict,
    pictures: jax.Array,
    keys: jax.Array,
    step: jax.Array,
) -> Found:
    """The gradients of the trained groups, and those of the discriminator on the same pictures."""
    x, layers = objective.seen(rest, pictures)

    def make(moving: dict) -> tuple[jax.Array, jax.Array]:
        given, kl = objective.decoder_input(rest | moving, x, keys)
        return objective.networks.pictures(moving, given), kl

    (made, kl), pull = jax.vjp(make, moving)
    (loss, metrics), direction = jax.value_and_grad(objective.loss, has_aux=True)(made, pictures, layers, rest)
    beta = jnp.float32(objective.cfg.beta if objective.name == "vae" else 0.0)
    metrics = {"loss": loss + beta * kl, **metrics} | ({"kl_loss": kl} if objective.name == "vae" else {})
    critics = {}
    if adversary:

        def at_last_layer(direction: jax.Array) -> jax.Array:
            """The gradient of the last layer's kernel; XLA computes nothing else of `pull` here."""
            return pull((direction, jnp.zeros_like(kl)))[0]["pixel_decoder"]["pixels"]["kernel"]

        pushed, against = adversary.against(critic, rest, made, keys[0], step, direction, at_last_layer)
        direction = direction + pushed
        critics, judged = adversary.gradients(critic, rest, pictures, jax.lax.stop_gradient(made), keys[0])
        metrics |= against | judged
    return pull((direction, beta))[0], critics, metrics
