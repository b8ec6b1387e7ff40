"""A stage's training step with everything it takes, on random weights: no checkpoint is needed or written."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from starflow2_jax.models.pretzel import init_params
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import Stage
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.program import find_stage, held, in_tree, makes_vlm, require_rows
from starflow2_jax.training.step import TrainState, new_state, state_shardings


def fresh(trainer: Trainer, tree: str) -> dict:
    """Random parameters of one of the two trees, "frozen" or "trainable", born on their shards.

    A frozen VLM that the config does not pretrain itself is bfloat16, as the published ones are.
    """
    config = trainer.config
    published = tree == "frozen" and not makes_vlm(config)

    def init():
        params = init_params(trainer.model, jax.random.key(config.seed))
        params = {name: group for name, group in params.items() if in_tree(name, tree)}
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params) if published else params

    return jax.jit(init, out_shardings=sharding.tree_shardings(jax.eval_shape(init), trainer.mesh))()


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


def build(config: ConfigDict, stage: str | None, folder: str | Path) -> Program:
    """The step as the loop compiles it, with fresh weights and one real batch. `folder`: of the Trainer, left as it is."""
    trainer, stage = Trainer(config, folder), find_stage(config, stage)
    cfg = config.stages[stage.name]
    require_rows(config, stage, trainer.mesh)
    optimizer = trainer.optimizer(stage)
    mine = held(stage)
    other = "trainable" if mine == "frozen" else "frozen"
    with jax.set_mesh(trainer.mesh):
        params, rest = fresh(trainer, mine), fresh(trainer, other)
        make = partial(new_state, stage=stage, optimizer=optimizer, key=jax.random.key(config.seed))
        layout = state_shardings(jax.eval_shape(make, params), trainer.mesh, cfg.optimizer.offload)
        state = jax.jit(make, out_shardings=layout)(params)
        reader = trainer.reader(stage)
        batch = reader.place(next(reader), sharding.batch_sharding(trainer.mesh))
        compiled = trainer.step(stage, optimizer).lower(state, rest, batch).compile()
    return Program(trainer, stage, state, rest, batch, compiled)
