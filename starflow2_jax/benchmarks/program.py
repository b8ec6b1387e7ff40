"""A stage's training step with everything it takes, on random weights: no checkpoint is needed or written."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from starflow2_jax.config.schema import Config
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.program import find_stage, fresh_params, held, makes_vlm, other_tree, require_rows
from starflow2_jax.training.step import TrainState


def fresh(trainer: Trainer, tree: str) -> dict:
    """Random parameters of one of the two trees, "frozen" or "trainable", born on their shards.

    A frozen VLM that the config does not pretrain itself is bfloat16, as the published ones are.
    """
    published = tree == "frozen" and not makes_vlm(trainer.config)
    dtype = jnp.bfloat16 if published else None
    return fresh_params(trainer.model, trainer.config.seed, tree, trainer.mesh, dtype)


@dataclass
class Program:
    """A compiled step and what it works on. `run` takes a step and waits for it."""

    trainer: Trainer
    stage: Stage
    state: TrainState
    frozen: dict
    batch: Sequence
    compiled: jax.stages.Compiled

    def run(self) -> dict:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        return jax.block_until_ready(metrics)


def build(config: Config, stage: str | None, folder: str | Path) -> Program:
    """The step as the loop compiles it, with fresh weights and one real batch. `folder`: of the Trainer, left as it is."""
    trainer, stage = Trainer(config, folder), find_stage(config, stage)
    require_rows(config, stage, trainer.mesh)
    task = trainer.task(stage.name)
    with jax.set_mesh(trainer.mesh):
        state = task.new_state(fresh(trainer, held(stage)))
        rest = fresh(trainer, other_tree(held(stage)))
        reader = task.batches()
        batch = reader.place(next(reader), sharding.batch_sharding(trainer.mesh))
        compiled = task.step().lower(state, rest, batch).compile()
    return Program(trainer, stage, state, rest, batch, compiled)
