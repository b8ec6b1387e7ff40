"""A plan: the memory that a training step or a step of the sampler needs per chip, and its predicted time."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from jax.sharding import Mesh

from starflow2_jax.codecs.fae import FaeCodec
from starflow2_jax.config import loading as configs
from starflow2_jax.config.codec import CodecStageConfig, encoder_config, networks_config
from starflow2_jax.config.schema import Config
from starflow2_jax.fields import build
from starflow2_jax.models import flops
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.hardware import Gpu, Topology
from starflow2_jax.planning import compiling
from starflow2_jax.planning.compiling import DoesNotFit, Program
from starflow2_jax.planning.costs import MARGIN, MEASURED, NOT_COMPARED, ROOFLINE, Analysis, Costs
from starflow2_jax.planning.hlo import Module
from starflow2_jax.sampling.rows import bucket
from starflow2_jax.stages import CodecStage, Stage
from starflow2_jax.training.codec import task
from starflow2_jax.training.codec.flops import RULE, codec_flops, decoding_flops, encoding_flops
from starflow2_jax.training.codec.networks import Networks, networks_of
from starflow2_jax.training.program import batch_shape, held_whole


@dataclass
class Plan:
    """One program on one topology: bytes and FLOP per chip, seconds per step. All are predictions, not measurements."""

    what: str
    topology: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, object]
    fits: bool
    memory: float  # bytes that a chip has
    peak: float  # bytes that the program needs of them
    arguments: dict[str, float]  # bytes by kind of argument
    host: float = 0  # bytes of arguments in the host's memory
    temporary: float = 0  # bytes of activations, gathered parameters and gradients
    flops_by_hand: dict[str, float] = field(default_factory=dict)  # by part of the model, counted by `flops.RULE`
    hardware_by_hand: float = 0  # FLOP with recomputation, and attention as its kernel computes it
    flops_compiled: float = 0
    bytes_moved: float = 0
    collectives: list[dict] = field(default_factory=list)
    seconds: float = 0
    matrix_seconds: float = 0
    memory_seconds: float = 0
    exposed_seconds: float = 0  # spent waiting for the interconnect
    tokens_per_second: float = 0  # positions of all chips together
    seconds_a_token: float = 0  # of the sampler: to read or write one position of every row
    mfu: float = 0
    largest: list[tuple[float, str]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    whole: str = ""  # which parameters every chip holds whole, and what would cut them
    unknown_loops: int = 0
    compile_seconds: float = 0
    steps: int = 0  # of the training stage; 0: it is no training step
    likely: tuple[float, float] | None = None  # seconds, by how far off predictions were; None: nothing was measured
    rules: dict[str, str] = field(
        default_factory=lambda: {"flops": flops.RULE, "roofline": ROOFLINE, "margin": NOT_COMPARED}
    )

    def json(self) -> dict:
        """Every field, as JSON values."""
        return asdict(self)


def plan_step(config: Config, stage: Stage, topology: Topology, devices: list, codec: FaeCodec | None = None) -> Plan:
    """Compile the stage's training step for the devices of a topology, and predict its costs.

    `codec`: all images of the batch are pictures that this codec encodes in the step; None: their latents are read.
    """
    shape, model = batch_shape(config, stage), configs.pretzel(config)
    what, chosen = f"training step, stage {stage.name}", settings(config, stage)
    hand = flops.training_flops(model, stage, shape)
    if codec:
        what += ", pictures encoded in the step"
        encoding = encoding_flops(networks_of(codec), shape.rows * shape.images)
        hand = flops.Flops(hand.model | encoding.model, hand.hardware | encoding.hardware)
    plan = Plan(what, str(topology), topology.chips, {}, chosen, False, topology.chip.memory, 0, {})
    plan.steps = config.stages[stage.name].steps
    return _of_step(
        plan,
        hand,
        shape.rows * shape.length,
        topology,
        partial(compiling.compile_step, config, stage, devices, codec),
        lambda mesh: held_whole(config, Pretzel(model), mesh),
        lambda: advice(plan, config, stage),
    )


def plan_codec_step(config: Any, stage: CodecStage, topology: Topology, devices: list) -> Plan:
    """The same of a codec's stage. A position is a token of a picture."""
    cfg = config.stages[stage.name]
    networks = Networks(networks_config(config), config.encoder.kind, encoder_config(config))
    chosen = codec_settings(config, stage)
    what = f"training step of a codec, stage {stage.name}"
    plan = Plan(what, str(topology), topology.chips, {}, chosen, False, topology.chip.memory, 0, {})
    plan.rules["flops"], plan.steps = RULE, cfg.steps
    hand = codec_flops(networks, stage, build(CodecStageConfig, cfg.to_dict(), f"stages.{stage.name}"))
    return _of_step(
        plan,
        hand,
        cfg.rows * networks.tokens,
        topology,
        partial(compiling.compile_codec_step, config, stage, devices),
        lambda mesh: task.held_whole(config, mesh),
        lambda: codec_advice(config, stage),
    )


def _of_step(
    plan: Plan,
    hand: flops.Flops,
    positions: int,
    topology: Topology,
    compiled: Callable[[], Program],
    whole: Callable[[Mesh], str],
    advised: Callable[[], list[str]],
) -> Plan:
    """The plan of a step, filled in. positions: of a batch."""
    begin = time.time()
    plan.flops_by_hand = {part: value / topology.chips for part, value in hand.model.items()}
    plan.hardware_by_hand = hand.executed / topology.chips
    try:
        program = compiled()
    except DoesNotFit as error:
        plan.peak, plan.largest = error.needed, error.largest
        plan.advice = advised()
        return plan
    plan.compile_seconds = time.time() - begin
    plan.whole = whole(program.mesh)
    costs = _measure(plan, program, topology)
    if isinstance(topology.chip, Gpu):
        plan.likely, plan.rules["margin"] = (costs.seconds * MARGIN[0], costs.seconds * MARGIN[1]), MEASURED
    plan.tokens_per_second = positions / costs.seconds
    plan.mfu = hand.mfu(costs.seconds, topology.chips, topology.chip.flops)
    if not plan.fits:
        plan.advice = advised()
    return plan


def plan_decoder(config: Config, codec: FaeCodec, topology: Topology, devices: list, rows: int) -> Plan:
    """A plan of the codec's decoder over the latents of one picture for each row."""
    what, memory = "sampler, decode: one picture a row", topology.chip.memory
    plan = Plan(what, str(topology), topology.chips, {}, {"rows": rows}, False, memory, 0, {})
    plan.rules["flops"] = flops.SAMPLING_RULE
    hand = decoding_flops(networks_of(codec), rows)

    def advised() -> list[str]:
        return ["fewer rows, or codec.dtype=bfloat16"]

    return _of_step(
        plan,
        hand,
        rows * codec.grid[0] * codec.grid[1],
        topology,
        partial(compiling.compile_decoder, config, codec, devices, rows),
        lambda mesh: "",
        advised,
    )


def codec_advice(config: Any, stage: CodecStage) -> list[str]:
    """Changes that lower the memory of a codec's config whose plan does not fit, most effective first."""
    cfg = config.stages[stage.name]
    changes = [f"stages.{stage.name}.accumulate={2 * cfg.accumulate}, or fewer rows"]
    if parts := [part for part in ("encoder", "networks") if config[part].remat != "full"]:
        changes.append(", ".join(f"{part}.remat=full" for part in parts))
    if parts := [part for part in ("encoder", "networks") if config[part].dtype != "bfloat16"]:
        changes.append(", ".join(f"{part}.dtype=bfloat16" for part in parts))
    if stage.pixels and cfg.critic.kind == "patch":
        changes.append(f"stages.{stage.name}.critic.channels below {cfg.critic.channels}")
    return [*changes, "more chips on the fsdp axis (mesh.fsdp=-1), over which parameters and optimizer are spread"]


def plan_sampler(
    config: Config, stage: Stage, topology: Topology, devices: list, rows: int, capacity: int
) -> list[Plan]:
    """Plans of the sampler's `read` and `write`, see compile_sampler; a single plan if they do not fit.

    A turn of `write` runs one position of each row, and one of its guidance.
    """
    plans = []
    try:
        programs = compiling.compile_sampler(config, stage, devices, rows, capacity)
    except DoesNotFit as error:
        memory = topology.chip.memory
        plan = Plan("sampler", str(topology), topology.chips, {}, {}, False, memory, error.needed, {})
        plan.largest = error.largest
        plan.advice = ["fewer rows, a smaller capacity, or a larger tensor axis, which splits the caches' heads"]
        return [plan]
    B, lanes = rows + -rows % sharding.row_shards(programs["read"].mesh), 2
    hand = flops.sampling_flops(configs.pretzel(config), stage, B, bucket(capacity), lanes)
    for name, program in programs.items():
        what = f"sampler, {name}: {'half of the capacity' if name == 'read' else 'one position a row'}"
        chosen = {"rows": rows, "capacity": capacity, "guidance": True}
        plan = Plan(what, str(topology), topology.chips, {}, chosen, False, topology.chip.memory, 0, {})
        plan.flops_by_hand = {part: value / topology.chips for part, value in hand[name].model.items()}
        plan.hardware_by_hand = hand[name].executed / topology.chips
        plan.rules["flops"] = flops.SAMPLING_RULE
        costs = _measure(plan, program, topology)
        tokens = capacity // 2 if name == "read" else 1  # of a row
        plan.tokens_per_second, plan.seconds_a_token = rows * tokens / costs.seconds, costs.seconds / tokens
        plan.mfu = hand[name].mfu(costs.seconds, topology.chips, topology.chip.flops)
        plans.append(plan)
    return plans


def settings(config: Config, stage: Stage) -> dict[str, object]:
    """The settings of a config that decide about memory and speed."""
    cfg, m = config.stages[stage.name], config.model
    found = {name: getattr(cfg, name) for name in ("rows", "length", "images", "patches", "vlm_length", "accumulate")}
    for part in ("vlm", "shallow", "deep"):
        found |= {f"{part}.{name}": getattr(getattr(m, part), name) for name in ("remat", "kernel", "dtype")}
    return found | {f"optimizer.{k}": getattr(cfg.optimizer, k) for k in ("name", "moments", "offload")}


def codec_settings(config: Any, stage: CodecStage) -> dict[str, object]:
    """The same of a codec's config."""
    cfg = config.stages[stage.name]
    found: dict[str, object] = {name: getattr(cfg, name) for name in ("rows", "accumulate")}
    found |= {f"{part}.{name}": config[part][name] for part in ("encoder", "networks") for name in ("dtype", "remat")}
    return found | {"critic": cfg.critic.kind, "optimizer.name": cfg.optimizer.name}


def _measure(plan: Plan, program: Program, topology: Topology) -> Costs:
    """Fill in the plan's numbers that come from the compiled program."""
    memory: Any = program.compiled.memory_analysis()
    plan.mesh, plan.arguments, plan.host = dict(program.mesh.shape), program.arguments, program.host
    plan.temporary = memory.temp_size_in_bytes
    plan.peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    plan.fits = plan.peak <= plan.memory
    module = Module(program.compiled.as_text() or "")
    costs = Analysis(module, topology, plan.mesh, topology.places(list(program.mesh.devices.flat))).costs
    plan.flops_compiled, plan.bytes_moved = costs.flops, costs.bytes
    plan.seconds, plan.matrix_seconds, plan.exposed_seconds = costs.seconds, costs.matrix_seconds, costs.exposed
    plan.memory_seconds = costs.bytes / topology.chip.bandwidth
    plan.collectives = sorted(map(asdict, costs.collectives.values()), key=lambda c: -c["seconds"])
    plan.unknown_loops = len(costs.unknown)
    plan.largest = largest_arrays(module)
    return costs


def largest_arrays(module: Module, count: int = 8) -> list[tuple[float, str]]:
    """The largest arrays of a program in HBM as (bytes, shape and operation), one of each shape."""
    found: dict[str, tuple[float, str]] = {}
    for computation in module.computations.values():
        for at in computation.values():
            if at.opcode in ("tuple", "parameter", "get-tuple-element", "while", "bitcast", "constant"):
                continue
            for array in at.arrays:
                shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
                if array.hbm and shape not in found:
                    name = at.attributes.partition('op_name="')[2].partition('"')[0]
                    found[shape] = array.hbm, f"{shape} {name or at.opcode}"
    return sorted(found.values(), reverse=True)[:count]


def advice(plan: Plan, config: Config, stage: Stage) -> list[str]:
    """Changes that lower the memory of a config whose plan does not fit, most effective first."""
    cfg, changes = config.stages[stage.name], []
    state = sum(v for k, v in plan.arguments.items() if k != "batch")
    if not plan.arguments or state > plan.memory / 2:
        changes.append(
            "more chips on the fsdp axis (mesh.fsdp=-1, data=1), over which parameters and optimizer are spread"
        )
        changes.append("stages.*.optimizer.moments=bfloat16, or optimizer.name=adafactor and moments=float32")
        if not cfg.optimizer.offload:
            changes.append("stages.*.optimizer.offload=True: the optimizer's state moves to the host's memory")
    streams = [part for part in ("vlm", "deep", "shallow") if getattr(config.model, part).remat != "full"]
    if streams:
        changes.append(f"remat=full in {', '.join(f'model.{s}' for s in streams)}")
    if any(getattr(config.model, part).kernel == "xla" for part in ("vlm", "deep")):
        changes.append(
            "a kernel that holds no attention matrix in memory in model.vlm, model.deep and model.shallow: splash on "
            "TPUs, cudnn_packed or triton on GPUs"
        )
    changes.append(
        "mesh.tensor or mesh.sequence above 1: several chips share a row's heads or positions, and its activations"
    )
    changes.append(f"stages.{stage.name}.accumulate={2 * cfg.accumulate}, or fewer rows, or shorter ones")
    return changes
