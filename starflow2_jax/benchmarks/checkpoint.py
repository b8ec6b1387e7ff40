"""What saving and restoring a training state costs."""

import statistics
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from starflow2_jax.benchmarks.program import build
from starflow2_jax.benchmarks.train import step_seconds
from starflow2_jax.checkpoints.directory import CheckpointDirectory, abstract
from starflow2_jax.checkpoints.retention import Keep


def measure(config: ConfigDict, stage: str | None, saves: int, folder: Path) -> dict:
    """Medians over `saves` saves of a stage's state into `folder`, and one restore.

    "stall_seconds": how long the loop is blocked; "write_seconds": until the files are complete, training meanwhile;
    "step_while_writing_seconds": a step in that time.
    """
    program = build(config, stage, folder / "trainer")
    step = step_seconds(program, steps=3)["median"]
    checkpoints = CheckpointDirectory(folder / "checkpoint", Keep(latest=1))
    checkpoints.create(config, program.trainer.codec, program.trainer.tokenizer)
    stalls, writes, steps = [], [], []
    for number in range(1, saves + 1):
        state = program.state
        trees = {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}
        begin = time.perf_counter()
        checkpoints.save(number, trees, {"stage": program.stage.name})
        stalls.append(time.perf_counter() - begin)
        stepped = time.perf_counter()
        program.run()
        steps.append(time.perf_counter() - stepped)
        checkpoints.wait()
        writes.append(time.perf_counter() - begin)
    saved = checkpoints.folder / "steps" / str(saves)
    size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    shapes = jax.eval_shape(lambda: {"params": state.params, "ema": state.ema, "optimizer": state.optimizer})
    begin = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(saves, abstract(shapes, program.trainer.mesh)))
    restore = time.perf_counter() - begin
    checkpoints.close()
    return {
        "stage": program.stage.name,
        "saves": saves,
        "bytes": size,
        "stall_seconds": statistics.median(stalls),
        "write_seconds": statistics.median(writes),
        "restore_seconds": restore,
        "write_bytes_per_second": size / statistics.median(writes),
        "step_seconds": step,
        "step_while_writing_seconds": statistics.median(steps),
    }
