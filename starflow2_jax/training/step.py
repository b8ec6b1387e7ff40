"""The training step of a stage: one pure function of state, frozen parameters and batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.likelihood import CHUNK
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage
from starflow2_jax.training import losses
from starflow2_jax.training.task import State

HOST = "pinned_host"  # JAX's name of the host memory that devices can read and write


class TrainState(State):
    """A stage's state. `params` holds all groups of one of the two trees, trained or not."""

    ema: dict  # moving average of the groups that are trained
    optimizer: optax.OptState  # of the groups that are trained


def new_state(params: dict, stage: Stage, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before a stage's first step, with copies of the trained parameters as their moving average."""
    moving = stage.trained(params)
    return TrainState(jnp.zeros((), jnp.int32), key, params, jax.tree.map(jnp.copy, moving), optimizer.init(moving))


def state_shardings(shapes: TrainState, mesh: jax.sharding.Mesh, offload: bool = False) -> TrainState:
    """The shardings of a state, by sharding.PARAMETER_RULES. `offload`: the optimizer's state is in host memory.

    Raises ConfigError if the devices cannot use host memory.
    """
    layout = sharding.tree_shardings(shapes, mesh)
    if not offload:
        return layout
    require_host(mesh)
    return layout.replace(optimizer=sharding.tree_shardings(shapes.optimizer, mesh, HOST))


def require_host(mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError if the devices cannot use host memory."""
    device = mesh.devices.flat[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ConfigError(
            f"optimizer.offload needs memory of the kind {HOST}, which devices of the platform {device.platform} do "
            f"not have here; set it to False"
        )


def offloaded(step: Callable) -> Callable:
    """`step` with the optimizer's state in host memory between steps; `state_shardings` places it there at the start.

    Apply it last, around all other wrappers that compute with the state: XLA would leave a scalar that they compute in
    host memory on the device.
    """

    def run(state: TrainState, *arguments):
        state = state.replace(optimizer=jax.device_put(state.optimizer, jax.memory.Space.Device))
        new, metrics = step(state, *arguments)
        return new.replace(optimizer=jax.device_put(new.optimizer, jax.memory.Space.Host)), metrics

    return run


def counted(step: Callable, stage: Stage) -> Callable:
    """`step` with two more metrics: "tokens", the number of positions that are not padding, and "targets"
    (losses.targets).
    """

    def run(state: TrainState, frozen: dict, batch: Sequence):
        state, metrics = step(state, frozen, batch)
        return state, metrics | {"tokens": jnp.sum(batch.segments > 0), "targets": losses.targets(batch, stage)}

    return run


def encoding(step: Callable, codec: Codec, parts: int) -> Callable:
    """`step` of batches with pictures, which the codec encodes with frozen["codec"]; `parts`: as for `encoded`."""

    def run(state: TrainState, frozen: dict, batch: Sequence):
        return step(state, frozen, encoded(codec, frozen, batch, parts))

    return run


def encoded(codec: Codec, frozen: dict, batch: Sequence, parts: int = 1) -> Sequence:
    """The batch with latents in place of its pictures, if it has any. `parts`: groups of rows, encoded one by one."""
    if batch.pictures is None:
        return batch

    def latents(part: Any) -> jax.Array:
        pixels = part.pictures.pixels / 127.5 - 1
        flat = codec.encode_with(frozen["codec"], pixels.reshape(-1, *pixels.shape[2:]))
        return jnp.where(part.pictures.waiting[..., None, None], flat.reshape(part.latents.shape), part.latents)

    new = jax.lax.map(latents, in_parts(batch, parts)) if parts > 1 else latents(batch)[None]
    return batch.replace(latents=new.swapaxes(0, 1).reshape(batch.latents.shape), pictures=None)


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss L_NF + text_weight L_NTP + latent_penalty P, of which a stage has some terms.

    L_NF is in nats per latent dimension and L_NTP in nats per token. P is the mean square of the outputs of a block of
    the shallow flow, summed over the blocks (STARFlow's regulariser, arXiv 2506.06276).
    """

    noise: ArrayLike = 0.0  # (D,): standard deviation of the Gaussian noise added to the latents
    text_weight: float = 1.0
    latent_penalty: float = 0.0
    vlm_length: int = 0  # number of positions of a row that the VLM reads (see Pretzel); 0: all
    text_chunk: int = CHUNK  # number of positions whose logits are in memory at once

    def total(self, means: dict[str, jax.Array]) -> jax.Array:
        """The loss (). `means`: the terms of `loss_sums`, divided by their counts."""
        return reduce(jnp.add, (self.text_weight * x if name == "text" else x for name, x in means.items()))


def loss_sums(
    model: Pretzel, params: dict, stage: Stage, batch: Sequence, objective: Objective, key: jax.Array | None
) -> dict[str, jax.Array]:
    """The terms of the stage's loss, summed over a batch: "image" and "text" in nats, and "penalty" with its weight.

    `key`: of the dropout; None: there is none.
    """
    output: Any = model.apply(
        {"params": params},
        batch,
        skips=stage.skips,
        deep=stage.deep,
        vlm_length=objective.vlm_length,
        rngs=None if key is None else {"dropout": key},
    )
    sums = {}
    if stage.image_loss:
        sums["image"] = jnp.sum(batch.image_weight * losses.image_nll(output, batch))
        if objective.latent_penalty:
            sums["penalty"] = objective.latent_penalty * jnp.sum(batch.image_weight * losses.latent_squares(output))
    if stage.text_loss:
        head: Any = model.apply({"params": params}, method=Pretzel.text_head)
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
    """The step of a stage: (state, frozen, batch) -> (state, metrics). It is not compiled.

    `accumulate`: number of micro-batches. Losses are divided by the counts of the whole batch, so this number does not
    change the result. `ema_decay`: of the moving average; in the first steps it is lower.
    """

    def step(state: TrainState, frozen: dict, batch: Sequence):
        key = jax.random.fold_in(state.key, state.step)
        batch = batch.replace(latents=batch.latents + objective.noise * jax.random.normal(key, batch.latents.shape))
        counts = {name: jnp.maximum(count, 1.0) for name, count in losses.counts(batch).items()}
        moving = stage.trained(state.params)
        rest = frozen | {name: tree for name, tree in state.params.items() if name not in moving}

        def loss(moving: dict, part: Sequence, key: jax.Array):
            sums = loss_sums(model, rest | moving, stage, part, objective, key)
            return objective.total({name: value / counts[name] for name, value in sums.items()}), sums

        gradients, sums = summed_gradients(loss, moving, batch, accumulate, jax.random.fold_in(key, 1))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, moving)
        moving: Any = optax.apply_updates(moving, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, moving)
        means = {name: value / counts[name] for name, value in sums.items()}
        metrics = {f"{name}_loss": value for name, value in means.items()} | {"loss": objective.total(means)}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        params = state.params | moving
        return state.replace(step=state.step + 1, params=params, ema=ema, optimizer=optimizer_state), metrics

    return step


def summed_gradients(loss: Callable, moving: dict, batch: Sequence, parts: int, key: jax.Array) -> tuple[dict, dict]:
    """The gradient of `loss` with respect to `moving`, and the sums that `loss` returns beside its value.

    `loss`: (moving, batch, key) -> (value, sums), both of them sums over rows. The rows run in `parts` micro-batches,
    one after the other.
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
    """The parameters that the next stage starts from: the moving average of the trained groups, and the other
    groups.
    """
    return state.params | state.ema
