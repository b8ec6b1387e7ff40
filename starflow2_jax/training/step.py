"""The training step: one pure function of state, frozen parameters and batch."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import struct

from starflow2_jax.errors import ConfigError
from starflow2_jax.models.likelihood import CHUNK
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage
from starflow2_jax.training import losses

HOST = "pinned_host"  # JAX's name of the host's memory that a device reads and writes


@struct.dataclass
class TrainState:
    step: jax.Array  # () int32, within the stage
    params: dict  # every group that this stage's checkpoints hold, trained or not
    ema: dict  # of the groups that are trained
    optimizer: optax.OptState  # of the groups that are trained
    key: jax.Array


def new_state(params: dict, stage: Stage, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    moving = {name: params[name] for name in stage.trains}
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, moving), optimizer.init(moving), key)


def state_shardings(shapes: TrainState, mesh: jax.sharding.Mesh, offload: bool = False) -> TrainState:
    """The shardings of a state, by PARAMETER_RULES. With `offload` the optimizer's state lies in the host's memory.

    Raises ConfigError if the devices cannot use the host's memory.
    """
    layout = sharding.tree_shardings(shapes, mesh)
    if not offload:
        return layout
    require_host(mesh)
    return layout.replace(optimizer=sharding.tree_shardings(shapes.optimizer, mesh, HOST))


def require_host(mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError if the devices cannot use the host's memory."""
    device = mesh.devices.flat[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ConfigError(
            f"optimizer.offload needs memory of the kind {HOST}, which {device.platform} does not have here"
        )


def offloaded(step: Callable) -> Callable:
    """`step` with the optimizer's state in the host's memory between steps; `state_shardings` places it there at first.

    It must wrap everything that computes with a state, because XLA leaves scalars that are computed in the host's memory
    on the device.
    """

    def run(state: TrainState, *arguments):
        state = state.replace(optimizer=jax.device_put(state.optimizer, jax.memory.Space.Device))
        new, metrics = step(state, *arguments)
        return new.replace(optimizer=jax.device_put(new.optimizer, jax.memory.Space.Host)), metrics

    return run


def counted(step: Callable, stage: Stage) -> Callable:
    """`step` with two more metrics: "tokens", the batch's positions without padding, and "targets", see `losses.targets`."""

    def run(state: TrainState, frozen: dict, batch: Sequence):
        state, metrics = step(state, frozen, batch)
        return state, metrics | {"tokens": jnp.sum(batch.segments > 0), "targets": losses.targets(batch, stage)}

    return run


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a stage's step: L_NF + text_weight L_NTP + latent_penalty P, with the terms that the stage has.

    L_NF is in nats per latent dimension, L_NTP in nats per token, P the mean squared output of each block of the shallow
    flow, summed over the blocks (STARFlow's regulariser, arXiv 2506.06276).
    """

    noise: jax.Array | float = 0.0  # (D,): standard deviation of the Gaussian noise added to the latents
    text_weight: float = 1.0
    latent_penalty: float = 0.0
    vlm_length: int = 0  # positions of a row that the VLM reads (see Pretzel); 0: all
    text_chunk: int = CHUNK  # positions whose logits are in memory at once

    def total(self, means: dict[str, jax.Array]) -> jax.Array:
        """The loss, from the means of the terms of `loss_sums`."""
        return sum(self.text_weight * value if name == "text" else value for name, value in means.items())


def loss_sums(
    model: Pretzel, params: dict, stage: Stage, batch: Sequence, objective: Objective, key: jax.Array | None
) -> dict[str, jax.Array]:
    """Sums of the stage's losses over a batch: "image" in nats over latent dimensions, "text" in nats over tokens, and
    "penalty" (with its factor) over latent dimensions. `key` is for the dropout; None: there is
    none."""
    switches = dict(skips=stage.skips, deep=stage.deep, vlm_length=objective.vlm_length)
    output = model.apply({"params": params}, batch, **switches, rngs=None if key is None else {"dropout": key})
    sums = {}
    if stage.image_loss:
        sums["image"] = jnp.sum(batch.image_weight * losses.image_nll(output, batch))
        if objective.latent_penalty:
            sums["penalty"] = objective.latent_penalty * jnp.sum(batch.image_weight * losses.latent_squares(output))
    if stage.text_loss:
        head = model.apply({"params": params}, method=Pretzel.text_head)
        sums["text"] = losses.text_cross_entropy(output.text, head, *batch.text_targets(), objective.text_chunk)
    return sums


def make_step(
    model: Pretzel,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    accumulate: int = 1,
    ema_decay: float = 0.999,
) -> Callable[[TrainState, dict, Sequence], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, frozen, batch) -> (state, metrics).

    `accumulate`: number of micro-batches. Losses are divided by the counts of the whole batch, so this number does not
    change the result.
    """

    def step(state: TrainState, frozen: dict, batch: Sequence):
        key = jax.random.fold_in(state.key, state.step)
        batch = batch.replace(latents=batch.latents + objective.noise * jax.random.normal(key, batch.latents.shape))
        counts = {name: jnp.maximum(count, 1.0) for name, count in losses.counts(batch).items()}
        moving = {name: state.params[name] for name in stage.trains}
        rest = frozen | {name: tree for name, tree in state.params.items() if name not in moving}

        def loss(moving: dict, part: Sequence, key: jax.Array):
            sums = loss_sums(model, rest | moving, stage, part, objective, key)
            return objective.total({name: value / counts[name] for name, value in sums.items()}), sums

        gradients, sums = summed_gradients(loss, moving, batch, accumulate, jax.random.fold_in(key, 1))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, moving)
        moving = optax.apply_updates(moving, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, moving)
        means = {name: value / counts[name] for name, value in sums.items()}
        metrics = {f"{name}_loss": value for name, value in means.items()} | {"loss": objective.total(means)}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        params = state.params | moving
        return state.replace(step=state.step + 1, params=params, ema=ema, optimizer=optimizer_state), metrics

    return step


def summed_gradients(loss: Callable, moving: dict, batch: Sequence, parts: int, key: jax.Array) -> tuple[dict, dict]:
    """The gradient of `loss` with respect to `moving`, and the sums that `loss` also returns.

    `loss`: (moving, batch, key) -> (value, sums), both additive over rows. The rows run in `parts` micro-batches, one after
    the other.
    """
    gradient, keys = jax.grad(loss, has_aux=True), jax.random.split(key, parts)
    if parts == 1:
        return gradient(moving, batch, keys[0])

    def add(carry, part_and_key):
        return jax.tree.map(jnp.add, carry, gradient(moving, *part_and_key)), None

    cut = in_parts(batch, parts)
    shapes = jax.eval_shape(gradient, moving, jax.tree.map(lambda x: x[0], cut), keys[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, (cut, keys))[0]


def in_parts(batch: Sequence, parts: int) -> Sequence:
    """The micro-batches (parts, B / parts, ...) of a batch (B, ...)."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def finish(state: TrainState) -> dict:
    """The parameters that the next stage gets: the moving average of the trained groups, and the other groups as they are."""
    return state.params | state.ema
