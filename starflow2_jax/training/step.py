"""The training step: one pure function of state, frozen parameters and batch."""

from collections.abc import Callable

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
    params: dict  # every group that this stage's checkpoints hold, moving or not
    ema: dict  # of the groups that move
    optimizer: optax.OptState  # of the groups that move
    key: jax.Array


def new_state(params: dict, stage: Stage, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    moving = {name: params[name] for name in stage.trains}
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, moving), optimizer.init(moving), key)


def state_shardings(shapes: TrainState, mesh: jax.sharding.Mesh, offload: bool = False) -> TrainState:
    """Where a state of such shapes lies: by PARAMETER_RULES, with `offload` what the optimizer keeps in the host's memory.

    Raises ConfigError where the devices reach no such memory.
    """
    layout = sharding.tree_shardings(shapes, mesh)
    if not offload:
        return layout
    require_host(mesh)
    return layout.replace(optimizer=sharding.tree_shardings(shapes.optimizer, mesh, HOST))


def require_host(mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where the devices reach no memory of the host."""
    device = mesh.devices.flat[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ConfigError(
            f"optimizer.offload needs memory of the kind {HOST}, which {device.platform} does not have here"
        )


def offloaded(step: Callable) -> Callable:
    """`step`, what the optimizer keeps in the host's memory between steps; `state_shardings` places it there to begin with.

    It goes around all that computes with a state: of computations in the host's memory XLA leaves scalars on the device.
    """

    def run(state: TrainState, *arguments):
        state = state.replace(optimizer=jax.device_put(state.optimizer, jax.memory.Space.Device))
        new, metrics = step(state, *arguments)
        return new.replace(optimizer=jax.device_put(new.optimizer, jax.memory.Space.Host)), metrics

    return run


def loss_sums(
    model: Pretzel,
    params: dict,
    stage: Stage,
    batch: Sequence,
    text_chunk: int,
    key: jax.Array,
    vlm_length: int = 0,
    latent_penalty: float = 0.0,
) -> dict[str, jax.Array]:
    """Sums of the stage's losses over a batch: "image" in nats over dimensions, "text" in nats over tokens; "penalty" over
    dimensions, where there is one.

    `key`: of the dropout; `vlm_length`: as Pretzel's; `latent_penalty`: factor of the intermediate latents' squares.
    """
    switches = dict(skips=stage.skips, deep=stage.deep, vlm_length=vlm_length)
    output = model.apply({"params": params}, batch, **switches, rngs={"dropout": key})
    sums = {}
    if stage.image_loss:
        sums["image"] = jnp.sum(batch.image_weight * losses.image_nll(output, batch))
        if latent_penalty:
            sums["penalty"] = latent_penalty * jnp.sum(batch.image_weight * losses.latent_squares(output))
    if stage.text_loss:
        head = model.apply({"params": params}, method=Pretzel.text_head)
        sums["text"] = losses.text_cross_entropy(output.text, head, *batch.text_targets(), text_chunk)
    return sums


def make_step(
    model: Pretzel,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    *,
    noise: jax.Array | float,
    text_weight: float,
    accumulate: int = 1,
    ema_decay: float = 0.999,
    text_chunk: int = CHUNK,
    vlm_length: int = 0,
    latent_penalty: float = 0.0,
) -> Callable[[TrainState, dict, Sequence], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, frozen, batch) -> (state, metrics).

    `noise` (D,): deviation of the noise added to the latents; `text_weight`: lambda of L_NF + lambda L_NTP; `accumulate`:
    micro-batches that the rows are cut into. Losses are divided by the whole batch's counts, so the cut changes nothing.
    `vlm_length`: how many positions of a row the VLM runs over (see Pretzel; 0: all). `latent_penalty`: STARFlow's
    regulariser (arXiv 2506.06276), so often the mean square of what leaves each block of the shallow flow.
    """

    def loss_fn(moving, rest, batch, weights, key):
        sums = loss_sums(model, rest | moving, stage, batch, text_chunk, key, vlm_length, latent_penalty)
        return sum(weights[name] * value for name, value in sums.items()), sums

    def step(state: TrainState, frozen: dict, batch: Sequence):
        key = jax.random.fold_in(state.key, state.step)
        batch = batch.replace(latents=batch.latents + noise * jax.random.normal(key, batch.latents.shape))
        totals = {k: jnp.maximum(v, 1.0) for k, v in losses.counts(batch).items()}
        totals["penalty"] = totals["image"]
        weights = {"image": 1 / totals["image"], "penalty": 1 / totals["image"], "text": text_weight / totals["text"]}
        moving = {name: state.params[name] for name in stage.trains}
        rest = frozen | {k: v for k, v in state.params.items() if k not in moving}
        gradient = jax.grad(loss_fn, has_aux=True)

        keys = jax.random.split(jax.random.fold_in(key, 1), accumulate)  # of the dropout

        def micro(carry, part_and_key):
            part, key = part_and_key
            return jax.tree.map(jnp.add, carry, gradient(moving, rest, part, weights, key)), None

        if accumulate == 1:
            grads, sums = gradient(moving, rest, batch, weights, keys[0])
        else:
            cut = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            shapes = jax.eval_shape(gradient, moving, rest, jax.tree.map(lambda x: x[0], cut), weights, keys[0])
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(micro, zero, (cut, keys))

        updates, optimizer_state = optimizer.update(grads, state.optimizer, moving)
        moving = optax.apply_updates(moving, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, moving)
        metrics = {f"{name}_loss": value / totals[name] for name, value in sums.items()}
        metrics["loss"] = sum(weights[name] * value for name, value in sums.items())
        metrics["grad_norm"] = optax.tree.norm(grads)
        return state.replace(
            step=state.step + 1, params=state.params | moving, ema=ema, optimizer=optimizer_state
        ), metrics

    return step


def finish(state: TrainState) -> dict:
    """What a stage hands on: its parameters, the moving groups as their moving average."""
    return state.params | state.ema
