"""A stage's compiled training step with random weights and one batch. No checkpoint is read or written."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from starflow2_jax.config.schema import Config
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.program import find_stage, fresh_params, makes_vlm, other_tree, require_rows, trained_tree
from starflow2_jax.training.step import TrainState


def fresh(trainer: Trainer, tree: str) -> dict:
    """Random parameters of one of the two trees, "frozen" or "trainable", each made on its shards.

    A frozen VLM that the config does not pretrain is bfloat16, like the published ones.
    """
    published = tree == "frozen" and not makes_vlm(trainer.config)
    dtype = jnp.bfloat16 if published else None
    return fresh_params(trainer.model, trainer.config.seed, tree, trainer.mesh, dtype)


@dataclass
class Program:
    """A compiled step with its state, frozen parameters and batch."""

    trainer: Trainer
    stage: Stage
    state: TrainState
    frozen: dict
    batch: Sequence
    compiled: jax.stages.Compiled

    def run(self) -> dict:
        """Take one step, wait for it and return its metrics."""
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        return jax.block_until_ready(metrics)


def build(config: Config, stage: str | None, folder: str | Path) -> Program:
    """Compile a stage's step as the loop does, with random weights and one batch of the config's data.

    `folder`: the Trainer's checkpoint directory, to which nothing is written. Raises ConfigError.
    """
    trainer, chosen = Trainer(config, folder), find_stage(config, stage)
    require_rows(config, chosen, trainer.mesh)
    task = trainer.task(chosen.name)
    with jax.set_mesh(trainer.mesh):
        state = task.new_state(fresh(trainer, trained_tree(chosen)))
        rest = fresh(trainer, other_tree(trained_tree(chosen)))
        reader = task.batches()
        batch = reader.place(next(reader), sharding.batch_sharding(trainer.mesh))
        compiled = task.step().lower(state, rest, batch).compile()
    return Program(trainer, chosen, state, rest, batch, compiled)
