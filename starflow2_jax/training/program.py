"""A stage's compiled step, and the shapes and shardings of its arguments, which need no devices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped
from jax.typing import DTypeLike
from numpy.typing import ArrayLike
from optax import GradientTransformation

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.config.schema import Config
from starflow2_jax.data.groups import rows_of_a_group
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.kernels import most_documents
from starflow2_jax.models.pretzel import FROZEN, Pretzel, PretzelConfig, init_params
from starflow2_jax.parallel import devices, sharding
from starflow2_jax.sequence import Sequence, Shape, VisionInput
from starflow2_jax.stages import CODEC_STAGES, STAGES, CodecStage, Stage
from starflow2_jax.training.faults import guarded
from starflow2_jax.training.step import (
    HOST,
    Objective,
    TrainState,
    counted,
    encoding,
    make_step,
    new_state,
    offloaded,
    state_shardings,
)

PAPER = {"1": "text_to_image", "2": "image_to_text", "3": "joint"}


def jitted_step(
    config: Config,
    model: Pretzel,
    stage: Stage,
    optimizer: GradientTransformation,
    deviations: ArrayLike,
    mesh: Mesh,
    codec: Codec | None = None,
) -> Wrapped:
    """The step of a stage as `task.Step` describes it, compiled when it is first called.

    Input and output state share one sharding, so steps can be chained. `deviations` (D,): standard deviations of the
    codec's latent channels. `codec`: encodes the batch's pictures, if it has any, with the step's frozen["codec"].
    """
    cfg = config.stages[stage.name]
    loss = objective(config, stage, deviations)
    update = make_step(model, stage, optimizer, loss, accumulate=cfg.accumulate, ema_decay=cfg.ema)
    if codec:
        update = encoding(update, codec, cfg.accumulate)
    step = guarded(counted(update, stage), config.faults)
    if cfg.optimizer.offload:
        step = offloaded(step)
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, stage, optimizer, mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))


def objective(config: Config, stage: Stage, deviations: ArrayLike) -> Objective:
    """The loss of a stage's step. `deviations`: as for `jitted_step`."""
    cfg = config.stages[stage.name]
    return Objective(
        noise=config.noise / np.asarray(deviations, np.float32),
        text_weight=cfg.text_weight,
        latent_penalty=cfg.latent_penalty,
        vlm_length=cfg.vlm_length,
    )


def find_stage(config: Config, text: str | None) -> Stage:
    """A stage of the config by name, or by its number in the paper (1, 2, 3); None: the last stage of the config's
    order.

    Raises ConfigError if the config has no such stage.
    """
    return STAGES[_named(config, text, tuple(STAGES), "name one of {}, or 1, 2 or 3")]


def find_codec_stage(config: Any, text: str | None) -> CodecStage:
    """A stage of a codec's config by name; None: the last of the config's order. Raises ConfigError if it has no such
    stage.
    """
    return CODEC_STAGES[_named(config, text, tuple(CODEC_STAGES), "name one of {}")]


def _named(config: Any, text: str | None, table: tuple[str, ...], advice: str) -> str:
    name = config.order[-1] if text is None else text if text in table else PAPER.get(text, text)
    if name not in table or name not in config.stages:
        known = advice.format(", ".join(sorted(config.stages)))
        raise ConfigError(f"there is no stage {text!r} in this config; {known}")
    return name


def require_rows(config: Config, stage: Stage, mesh: Mesh) -> None:
    """Raises ConfigError if a stage's rows cannot be divided into groups and micro-batches and over the mesh."""
    cfg = config.stages[stage.name]
    spread = sharding.row_shards(mesh) * cfg.accumulate
    if cfg.rows % spread:
        raise ConfigError(
            f"stages.{stage.name}.rows={cfg.rows} must be a multiple of {spread}, which is mesh.data x mesh.fsdp x "
            f"accumulate"
        )
    rows_of_a_group(cfg.rows, config.data.groups)


def trained_tree(stage: Stage) -> str:
    """The tree that the stage trains, "frozen" or "trainable". Its state and checkpoints have all groups of this
    tree.
    """
    return "frozen" if set(stage.trains) <= set(FROZEN) else "trainable"


def other_tree(tree: str) -> str:
    """The other one of the two trees."""
    return "trainable" if tree == "frozen" else "frozen"


def makes_vlm(config: Config) -> bool:
    """Whether one of the config's stages trains the VLM, so that no published one is needed."""
    return any(trained_tree(STAGES[name]) == "frozen" for name in config.order)


def batch_shape(config: Config, stage: Stage) -> Shape:
    """The sizes of a stage's batch. With the kernel cudnn_packed, the number of documents in a row is limited."""
    cfg = config.stages[stage.name]
    packed = any(getattr(config.model, stream).kernel == "cudnn_packed" for stream in ("vlm", "deep"))
    documents = most_documents(cfg.length) if packed else 0
    return Shape(cfg.rows, cfg.length, cfg.images, cfg.patches, cfg.vlm_length, documents)


def abstract_params(model: Pretzel, tree: str) -> dict:
    """Shapes and types of the parameters of one of the two trees, "frozen" or "trainable". Uses no memory and no
    devices.
    """
    return jax.eval_shape(lambda: _initial(model, 0, tree))


def fresh_params(model: Pretzel, seed: int, tree: str, mesh: Mesh, dtype: DTypeLike | None = None) -> dict:
    """Fresh parameters of one of the two trees, each made on its shards. `dtype`: of all parameters; None: fp32."""
    make = partial(_initial, model, seed, tree, dtype)
    return jax.jit(make, out_shardings=sharding.tree_shardings(jax.eval_shape(make), mesh))()


def fresh_group(model: Pretzel, seed: int, name: str, mesh: Mesh) -> dict:
    """The group `name` of what `fresh_params` makes."""

    def make() -> dict:
        return init_params(model, jax.random.key(seed))[name]

    return jax.jit(make, out_shardings=sharding.tree_shardings({name: jax.eval_shape(make)}, mesh)[name])()


def _initial(model: Pretzel, seed: int, tree: str, dtype: DTypeLike | None = None) -> dict:
    params = init_params(model, jax.random.key(seed))
    params = {name: group for name, group in params.items() if (name in FROZEN) == (tree == "frozen")}
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_state(
    config: Config, model: Pretzel, stage: Stage, optimizer: GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of a stage's state. Uses no memory and no devices."""
    params = abstract_params(model, trained_tree(stage))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(partial(new_state, stage=stage, optimizer=optimizer), params, key=key)
    layout = state_shardings(state, mesh, config.stages[stage.name].optimizer.offload)
    return sharding.placed(state, layout)


def abstract_arguments(
    config: Config, model: Pretzel, stage: Stage, optimizer: GradientTransformation, mesh: Mesh
) -> tuple:
    """Shapes, types and shardings of the step's state, frozen parameters and batch.

    If the config does not pretrain the VLM itself, the VLM comes from a published checkpoint, which is bfloat16.
    """
    rest = _as_published(config, abstract_params(model, other_tree(trained_tree(stage))))
    batch = sharding.placed(empty_batch(model.cfg, batch_shape(config, stage)), sharding.batch_sharding(mesh))
    return abstract_state(config, model, stage, optimizer, mesh), sharding.abstract(rest, mesh), batch


def require_memory(config: Config, model: Pretzel, stage: Stage, optimizer: GradientTransformation, mesh: Mesh) -> None:
    """`require_room` for the arguments of a stage's step."""
    require_room(abstract_arguments(config, model, stage, optimizer, mesh), mesh)


def require_room(arguments: Any, mesh: Mesh) -> None:
    """Raises ConfigError if the arguments of a step alone are larger than a device's memory, where that is known."""
    needed = bytes_a_device(arguments)
    if (memory := devices.memory(mesh.devices.flat[0])) is not None and needed > memory:
        raise ConfigError(
            f"parameters, optimizer and batch need {needed / 1e9:,.1f} GB on each device, which has "
            f"{memory / 1e9:,.1f} GB; use a smaller model or batch, or more devices on the axis mesh.fsdp"
        )


def bytes_a_device(tree: Any, host: bool = False) -> float:
    """Bytes of sharded arrays that one device holds, or with `host` the host's memory for it; without padding."""
    leaves = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == HOST) == host]
    return float(sum(np.prod(x.sharding.shard_shape(x.shape), dtype=float) * _width(x.dtype) for x in leaves))


def _width(dtype: Any) -> int:
    """Bytes of an element; a random key has 8."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def held_whole(config: Config, model: Pretzel, mesh: Mesh) -> str:
    """Says which parameters every device holds whole although they should be cut; "" if there are none, see
    `sharding`.
    """
    if mesh.shape["fsdp"] == 1:
        return ""
    frozen = _as_published(config, abstract_params(model, "frozen"))
    return sharding.held_whole({**frozen, **abstract_params(model, "trainable")}, mesh.shape)


def _as_published(config: Config, tree: dict) -> dict:
    if makes_vlm(config):
        return tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def empty_batch(cfg: PretzelConfig, shape: Shape) -> Sequence:
    """Shapes and types of the arrays of a batch."""
    B, S, M, P = shape.rows, shape.length, shape.images, shape.patches

    def number(*sizes: int) -> jax.Array:
        return jnp.zeros((B, *sizes), jnp.int32)

    def real(*sizes: int) -> jax.Array:
        return jnp.zeros((B, *sizes), jnp.float32)

    def batch() -> Sequence:
        vision = None
        if P and cfg.vlm.vision:
            vision = VisionInput(real(P, cfg.vlm.vision.patch_width), number(P, 2), number(P), number(P))
        latents = real(M, cfg.tokens, cfg.channels)
        return Sequence(number(S), number(S), number(S), number(S, 3), real(S), latents, real(M), vision)

    return jax.eval_shape(batch)
