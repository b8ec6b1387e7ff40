"""A stage's training step with everything it takes, on random weights: no checkpoint is needed or written."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from starflow2_jax import sharding
from starflow2_jax.config import ConfigError
from starflow2_jax.models.pretzel import FROZEN, init_params
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import STAGES, Stage
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.program import jitted_step
from starflow2_jax.training.step import TrainState, new_state, state_shardings


def chosen(config: ConfigDict, stage: str | None) -> Stage:
    """The stage of that name, or of that number (from 1) in the config's order; None: its last. Raises ConfigError."""
    order = list(config.order)
    names = {**{str(i): name for i, name in enumerate(order, 1)}, **{name: name for name in order}}
    name = order[-1] if stage is None else names.get(stage)
    if name is None:
        raise ConfigError(f"the config runs no stage {stage!r}; name one of {', '.join(order)}, or 1 to {len(order)}")
    return STAGES[name]


def fresh(trainer: Trainer, frozen: bool) -> dict:
    """Random parameters of one of the two trees, born on their shards.

    A frozen VLM that the config does not pretrain itself is bfloat16, as the published ones are.
    """
    config = trainer.config
    published = frozen and "pretrain" not in config.order

    def init():
        params = init_params(trainer.model, jax.random.key(config.seed))
        params = {name: tree for name, tree in params.items() if (name in FROZEN) == frozen}
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
    trainer, stage = Trainer(config, folder), chosen(config, stage)
    cfg = config.stages[stage.name]
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    vlm_moves = "vlm" in stage.trains
    with jax.set_mesh(trainer.mesh):
        params, rest = fresh(trainer, frozen=vlm_moves), fresh(trainer, frozen=not vlm_moves)
        make = partial(new_state, stage=stage, optimizer=optimizer, key=jax.random.key(config.seed))
        layout = state_shardings(jax.eval_shape(make, params), trainer.mesh, cfg.optimizer.get("offload", False))
        state = jax.jit(make, out_shardings=layout)(params)
        reader = trainer.reader(stage)
        batch = reader.place(next(reader), sharding.batch_sharding(trainer.mesh))
        step = jitted_step(config, trainer.model, stage, optimizer, trainer.codec.std)
        compiled = step.lower(state, rest, batch).compile()
    return Program(trainer, stage, state, rest, batch, compiled)
