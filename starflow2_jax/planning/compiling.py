"""Compiles the training step and the sampler's steps for TPUs and GPUs that are described, not present."""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from starflow2_jax.codecs.fae import FaeCodec, decode_with
from starflow2_jax.config import loading as configs
from starflow2_jax.config.schema import Config
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Pretzel, for_sampling, init_params
from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.hardware import Chip, Gpu, Topology
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.sampling import rows as row
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.engine import in_type, weights_in_type
from starflow2_jax.sequence import Pictures, Shape
from starflow2_jax.stages import CodecStage, Stage
from starflow2_jax.training import program
from starflow2_jax.training.codec.task import CodecTask
from starflow2_jax.training.optimizer import make_optimizer

# Keep libtpu from looking for a TPU on this machine, and from logging that there is none.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no process uses a chip, so several may plan at once
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# What launch/common.sh sets in LIBTPU_INIT_ARGS for runs on TPUs: weights are gathered beside computation.
TPU_OPTIONS = dict.fromkeys(
    (
        "xla_enable_async_all_gather",
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
    ),
    True,
)
# What launch/common.sh sets in XLA_FLAGS for runs on GPUs.
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}
OPTIONS = {"tpu": TPU_OPTIONS, "cuda": GPU_OPTIONS}
NO_TILES = "find output tile sizes that satisfy hlo"  # of XLA's message
TILES_HELP = (
    "XLA cannot compile a matrix product of this program to a Triton kernel; set "
    "XLA_FLAGS=--xla_gpu_enable_triton_gemm=false, with which cuBLAS computes all matrix products"
)
MISSING = "planning for {0} needs their compiler; install it with pip install 'starflow2_jax[{1}]'"


class DoesNotFit(UserError):
    """The program does not fit a chip: `needed` bytes, and its `largest` arrays as (bytes, description)."""

    def __init__(self, message: str, needed: float, largest: list[tuple[float, str]]):
        super().__init__(message)
        self.needed, self.largest = needed, largest


@dataclass
class Program:
    """A compiled program, the mesh that it runs on, and its arguments in bytes per chip, by kind of argument."""

    compiled: jax.stages.Compiled
    mesh: jax.sharding.Mesh
    arguments: dict[str, float] = field(default_factory=dict)
    host: float = 0  # bytes per chip of the arguments in the host's memory


def described_devices(topology: Topology) -> list:
    """The devices of a topology, as their compiler describes them. Raises UserError if the compiler is not installed or
    refuses the topology.
    """
    chip = topology.chip
    return _gpus(topology, chip) if isinstance(chip, Gpu) else _tpus(topology, chip)


def _tpus(topology: Topology, chip: Chip) -> list:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(MISSING.format("TPUs", "tpu")) from None
    described: dict[str, Any] = {}
    if chip.name == "v4":
        described["chip_config_name"] = "megacore"  # its two cores are one device
    if topology.chips < chip.chips_a_host:
        described["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    if topology.slices > 1:
        described["num_slices"] = topology.slices
    try:
        return list(topologies.get_topology_desc(topology.slice, platform="tpu", **described).devices)
    except Exception as error:  # libtpu raises several kinds for a topology that it does not know
        raise UserError(f"libtpu knows no topology {topology}: {str(error).splitlines()[0]}") from None


def _gpus(topology: Topology, gpu: Gpu) -> list:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(MISSING.format("GPUs", "cuda"))
    text, shape = target_config(gpu), "x".join(map(str, (1, *topology.shape)))
    return list(topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape).devices)


def target_config(gpu: Gpu) -> str:
    """What XLA must know of a GPU that is not there: its message GpuTargetConfigProto, as text.

    The limits of threads and registers are the same for all GPUs of the table. CUDA and cuDNN have the oldest versions
    that JAX supports.
    """
    device = dict(
        threads_per_block_limit=1024,
        threads_per_warp=32,
        threads_per_core_limit=2048,
        registers_per_core_limit=65536,
        registers_per_block_limit=65536,
        block_dim_limit_x=2**31 - 1,
        block_dim_limit_y=65535,
        block_dim_limit_z=65535,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared - 1024,
        shared_memory_per_core=gpu.shared,
        core_count=gpu.cores,
        fpus_per_core=gpu.units,
        clock_rate_ghz=gpu.clock,
        memory_bandwidth=int(gpu.bandwidth),
        device_memory_size=int(gpu.installed),
        l2_cache_size=gpu.cache,
    )
    lines = "\n".join(f"  {name}: {value}" for name, value in device.items())
    major, minor = gpu.capability
    versions = "\n".join(f'  {name}: "12.8.0"' for name in ("driver_version", "runtime_version"))
    return f"""gpu_device_info {{
{lines}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
{versions}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{gpu.kind}"
"""


@contextmanager
def _answering_for(device: Any) -> Iterator[None]:
    """While a program is traced for a GPU that is not there, let JAX take that GPU's compute capability for cuDNN's.

    JAX asks the GPU of this machine.
    """
    answers = {}
    if isinstance(described := getattr(device, "compute_capability", None), str):
        here = tuple(map(int, described.split(".")))
        answers["check_compute_capability"] = lambda least: here >= tuple(map(int, least.split(".")))
        answers["is_cuda_compute_capability_equal"] = lambda version: described == version
    kept = {name: getattr(cudnn, name) for name in answers}
    for name, answer in answers.items():
        setattr(cudnn, name, answer)
    try:
        yield
    finally:
        for name, answer in kept.items():
            setattr(cudnn, name, answer)


def compile_step(config: Config, stage: Stage, devices: list, codec: FaeCodec | None = None) -> Program:
    """Compile the training step of a stage for these devices. `codec`: encodes the batch's pictures in the step.

    Raises DoesNotFit and ConfigError.
    """
    cfg = config.stages[stage.name]
    model = Pretzel(configs.pretzel(config))
    mesh = _mesh(config, devices)
    program.require_rows(config, stage, mesh)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    with jax.set_mesh(mesh):
        state, frozen, batch = program.abstract_arguments(config, model, stage, optimizer, mesh)
        if codec:
            frozen |= {"codec": abstract(codec.encoder_weights(), mesh)}
            batch = batch.replace(pictures=_pictures(batch.latents, codec))
            codec = codec.without_weights()
        step = program.jitted_step(config, model, stage, optimizer, np.ones(model.cfg.channels), mesh, codec)
        compiled = compile_for(devices, step, state, frozen, batch)
    moving = stage.trained(state.params)
    still = {name: tree for name, tree in state.params.items() if name not in moving}
    kinds = dict(frozen=[frozen, still], trained=moving, average=state.ema, optimizer=state.optimizer, batch=batch)
    held = {name: program.bytes_a_device(tree) for name, tree in kinds.items()}
    return Program(compiled, mesh, held, program.bytes_a_device(kinds, host=True))


def compile_codec_step(config: Any, stage: CodecStage, devices: list) -> Program:
    """Compile the training step of a codec's stage for these devices. Raises DoesNotFit and ConfigError."""
    mesh = _mesh(config, devices)
    task = CodecTask(config, stage, mesh)
    task.require_rows()
    with jax.set_mesh(mesh):
        state, frozen, batch = task.abstract_state(), task.abstract_frozen(), task.abstract_batch()
        compiled = compile_for(devices, task.step(), state, frozen, batch)
    moving = stage.trained(state.params)
    still = {name: tree for name, tree in state.params.items() if name not in moving}
    trained = [moving, state.critic]
    optimizers = [state.optimizer, state.critic_optimizer]
    kinds = dict(frozen=[frozen, still], trained=trained, average=state.ema, optimizer=optimizers, batch=batch)
    return Program(compiled, mesh, {name: program.bytes_a_device(tree) for name, tree in kinds.items()})


def _pictures(latents: jax.ShapeDtypeStruct, codec: FaeCodec) -> Pictures:
    """The shapes of the `Pictures` that take the place of all latents (B, M, N, D) of a batch."""
    rows, where = latents.shape[:2], latents.sharding
    pixels = jax.ShapeDtypeStruct((*rows, *codec.image_shape), jnp.uint8, sharding=where)
    waiting = jax.ShapeDtypeStruct(rows, jnp.bool_, sharding=where)
    return cast(Any, Pictures)(pixels, waiting)


def compile_sampler(config: Config, stage: Stage, devices: list, rows: int, capacity: int) -> dict[str, Program]:
    """Compile the sampler's `read` and `write` for `rows` rows whose caches have room for `capacity` positions.

    `read` reads capacity / 2 positions of each row; a step of `write` adds one position to each. Guidance is on, and
    parameters and caches are bfloat16. Raises DoesNotFit.
    """
    cfg = for_sampling(in_type(configs.pretzel(config), "bfloat16"))
    model = Pretzel(cfg)
    mesh = _mesh(config, devices)
    B, capacity = rows + -rows % sharding.row_shards(mesh), row.bucket(capacity)
    branches = ("bare",)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        shapes = jax.eval_shape(partial(weights_in_type, dtype="bfloat16"), shapes)
        params = abstract(shapes, mesh)
        empty = jax.eval_shape(
            lambda: row.with_room(row.empty_rows(model, np.zeros(B, np.uint32), branches), capacity)
        ).replace(
            tokens=jax.ShapeDtypeStruct((B, capacity), jnp.int32),
            u=jax.ShapeDtypeStruct((B, capacity, cfg.channels), jnp.float32),
        )
        state = _on_rows(empty, mesh)
        images = max(1, capacity // 2 // (cfg.tokens + 2))
        shape = Shape(B, capacity // 2, images)
        batch, lengths = _on_rows((program.empty_batch(cfg, shape), jax.ShapeDtypeStruct((B,), jnp.int32)), mesh)
        ids = TokenIds(*range(5))  # which ids they are does not change the program
        kind = steps.Program(model, ids, stage.skips, branches)
        read = compile_for(devices, steps.read, kind, params, state, batch, 0, lengths, lengths)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
        write = compile_for(devices, steps.write, kind, params, state, count)
    kinds = {"parameters": program.bytes_a_device(params), "caches": program.bytes_a_device(state.caches)}
    return {"read": Program(read, mesh, kinds), "write": Program(write, mesh, kinds)}


def compile_decoder(config: Config, codec: FaeCodec, devices: list, rows: int) -> Program:
    """Compile the codec's decoder for the latents of one picture for each of `rows` rows. Raises DoesNotFit."""
    mesh = _mesh(config, devices)
    B = rows + -rows % sharding.row_shards(mesh)
    with jax.set_mesh(mesh):
        weights = abstract({name: tree for name, tree in codec.weights.items() if name.endswith("decoder")}, mesh)
        latents = _on_rows(jax.ShapeDtypeStruct((B, *codec.grid, codec.channels), jnp.float32), mesh)
        compiled = compile_for(devices, decode_with, codec.without_weights(), weights, latents)
    return Program(compiled, mesh, {"parameters": program.bytes_a_device(weights)})


def _mesh(config: Config, devices: list) -> jax.sharding.Mesh:
    """The mesh of a config over these devices."""
    sizes = config.mesh
    return sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices, sizes.sequence)


def _on_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of arrays whose first axis is rows, with the shardings of rows on the mesh."""
    return sharding.placed(tree, sharding.row_shardings(tree, mesh))


def compile_for(devices: list, function: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compile a jitted function for the devices' platform. Raises DoesNotFit."""
    gpus = devices[0].platform == "gpu"
    platform = "cuda" if gpus else devices[0].platform  # "gpu" would be lowered for ROCm, too
    with _answering_for(devices[0]):
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
    try:
        return lowered.compile(compiler_options=OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES in str(error):
            raise UserError(TILES_HELP) from None
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(str(error)) from None


def out_of_memory(message: str) -> DoesNotFit:
    """XLA's out-of-memory message, parsed."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", message)
    largest = []
    for size, unit, rest in re.findall(r"Size: ([\d.]+)([KMGT]?)B?(.*?)(?=\n\s*\d+\. Size:|\Z)", message, re.DOTALL):
        operator = re.search(r'op_name="([^"]*)"', rest)
        shape = re.search(r"Shape: (\S+)", rest)
        what = " ".join(part for part in (shape and shape[1], operator and operator[1]) if part)
        largest.append((_size(size, unit), what))
    short = f"the program needs {used[1]}{used[2]} of {used[3]}{used[4]}" if used else message.splitlines()[0]
    return DoesNotFit(f"does not fit: {short}", _size(used[1], used[2]) if used else float("nan"), largest[:10])


def _size(number: str, unit: str) -> float:
    """Bytes of a size in XLA's message, such as "1.5" and "G"."""
    return float(number) * 1024 ** " KMGT".index(unit or " ")
