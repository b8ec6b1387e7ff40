"""Measures step time, tokens per second, MFU and memory of a training step, with random weights and one real batch."""

import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from starflow2_jax import sequence
from starflow2_jax.benchmarks import profile
from starflow2_jax.benchmarks.program import Program, build
from starflow2_jax.config.schema import Config
from starflow2_jax.models import flops
from starflow2_jax.training.program import batch_shape

WARM_UP = 3  # steps before the timed ones
MATRIX = {"cpu": 2048, "gpu": 16384, "tpu": 16384}  # side of the square matrices whose product gives the measured peak


def measure(config: Config, stage: str | None, steps: int, folder: Path, trace: Path | None = None) -> dict:
    """Measure one stage's step over `steps` steps; docs/benchmarks/bench.md explains each number.

    `folder`: an empty one, for the Trainer. `trace`: the folder for a trace of the profiler; None: no trace. Raises
    ConfigError.
    """
    program = build(config, stage, folder)
    seconds = step_seconds(program, steps)
    devices = program.trainer.mesh.devices.ravel().tolist()
    shape = batch_shape(config, program.stage)
    counted = flops.training_flops(program.trainer.model.cfg, program.stage, shape)
    dtype = config.model.deep.dtype
    peak = matrix_peak(devices, dtype)
    tokens = int(np.sum(np.asarray(program.batch.modality) != sequence.PAD))
    found = {
        "stage": program.stage.name,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "steps": steps,
        "step_seconds": seconds,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / seconds["median"],
        "positions_per_second": shape.rows * shape.length / seconds["median"],
        "flop_per_step": counted.total,
        "flop_by_part": counted.model,
        "flop_rule": flops.RULE,
        "peak": {"flop_per_second_and_device": peak, "of": f"a product of {dtype} matrices on all devices at once"},
        "mfu": counted.mfu(seconds["median"], len(devices), peak),
        "memory": memory(program, devices),
    }
    if trace:
        found["profile"] = profile.top_operations(program.run, trace)
    return found


def step_seconds(program: Program, steps: int) -> dict[str, float]:
    """Median, least and most seconds of `steps` steps after WARM_UP others; the timer waits for each step."""
    for _ in range(WARM_UP):
        program.run()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        program.run()
        times.append(time.perf_counter() - begin)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def matrix_peak(devices: list, dtype: str, repeats: int = 5) -> float:
    """FLOP/s of a device in a large matrix product, the best of `repeats`.

    All devices compute at once, since devices of a CPU share its cores.
    """
    n = MATRIX.get(devices[0].platform, 8192)
    mesh = jax.sharding.Mesh(np.array(devices), ("each",))
    place = NamedSharding(mesh, PartitionSpec("each"))
    key = jax.random.key(0)
    make = jax.jit(lambda: jax.random.normal(key, (len(devices), n, n), dtype), out_shardings=place)
    product = jax.jit(lambda a: jnp.einsum("dij,djk->dik", a, a), out_shardings=place)
    a = make()
    jax.block_until_ready(product(a))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(product(a))
        times.append(time.perf_counter() - begin)
    return 2.0 * n**3 / min(times)


def memory(program: Program, devices: list) -> dict:
    """Bytes per device: "compiled", by kind of argument as the compiler counts them, and "peak_in_use", the most that
    was in use on any device (None if the devices do not report it)."""
    analysis = program.compiled.memory_analysis()
    account = {
        name: int(getattr(analysis, f"{name}_size_in_bytes", 0)) for name in ("argument", "output", "alias", "temp")
    }
    used = [stats["peak_bytes_in_use"] for d in devices if (stats := d.memory_stats()) and "peak_bytes_in_use" in stats]
    return {"compiled": account, "peak_in_use": max(used) if used else None}
