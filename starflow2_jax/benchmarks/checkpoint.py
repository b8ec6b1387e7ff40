"""Measures the time that saving and restoring a training state take."""

import statistics
import time
from pathlib import Path

import jax

from starflow2_jax.benchmarks.program import build
from starflow2_jax.benchmarks.train import step_seconds
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.checkpoints.steps import Steps
from starflow2_jax.config.schema import Config
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.training.task import groups


def measure(config: Config, stage: str | None, saves: int, folder: Path) -> dict:
    """Save a stage's state `saves` times into `folder` and restore it once. Returns the medians over the saves.

    "stall_seconds": the time for which the loop is blocked. "write_seconds": the time until the files are complete,
    while training continues. "step_while_writing_seconds": a step in that time. "bytes": of one checkpoint.
    """
    program = build(config, stage, folder / "trainer")
    step = step_seconds(program, steps=3)["median"]
    steps = Steps((folder / "checkpoint").resolve(), Keep(latest=1))
    stalls, writes, meanwhile = [], [], []
    for number in range(1, saves + 1):
        begin = time.perf_counter()
        steps.save(number, groups(program.state), {"stage": program.stage.name})
        stalls.append(time.perf_counter() - begin)
        stepped = time.perf_counter()
        program.run()
        meanwhile.append(time.perf_counter() - stepped)
        steps.wait()
        writes.append(time.perf_counter() - begin)
    size = sum(f.stat().st_size for f in steps.path(saves).rglob("*") if f.is_file())
    shapes = jax.eval_shape(lambda: groups(program.state))
    begin = time.perf_counter()
    jax.block_until_ready(steps.restore(saves, abstract(shapes, program.trainer.mesh)))
    restore = time.perf_counter() - begin
    steps.close()
    return {
        "stage": program.stage.name,
        "saves": saves,
        "bytes": size,
        "stall_seconds": statistics.median(stalls),
        "write_seconds": statistics.median(writes),
        "restore_seconds": restore,
        "write_bytes_per_second": size / statistics.median(writes),
        "step_seconds": step,
        "step_while_writing_seconds": statistics.median(meanwhile),
    }
