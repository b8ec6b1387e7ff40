"""A stage's training step with everything it takes, on random weights: no checkpoint, no file written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from starflow2_jax import sharding
from starflow2_jax.config import ConfigError
from starflow2_jax.data import sources
from starflow2_jax.data.pipeline import Shape, batches
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import STAGES, Stage
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.step import TrainState, new_state


def chosen(config: ConfigDict, stage: str | int | None) -> Stage:
    """The stage of that name, or of that number (from 1) in the config's order; None: its last. Raises ConfigError."""
    order = list(config.order)
    if stage is None:
        name = order[-1]
    elif str(stage).isdigit():
        name = order[int(stage) - 1] if 0 < int(stage) <= len(order) else stage
    else:
        name = stage
    if name not in order:
        raise ConfigError(f"the config runs no stage {stage!r}; name one of {', '.join(order)}, or 1 to {len(order)}")
    return STAGES[name]


def shape_of(config: ConfigDict, stage: Stage) -> Shape:
    cfg = config.stages[stage.name]
    return Shape(cfg.rows, cfg.length, cfg.images, cfg.patches)


def data(trainer: Trainer, stage: Stage) -> Iterator[Sequence]:
    """The stage's batches, in the order of a run that begins."""
    source = sources.documents(trainer.config, stage, trainer.codec.image_channels)
    shape, threads = shape_of(trainer.config, stage), trainer.config.data.threads
    return iter(batches(source, trainer.encoder(stage), shape, threads))


@dataclass
class Program:
    """A compiled step and what it works on. `run` takes a step and waits for it."""

    trainer: Trainer
    stage: Stage
    state: TrainState
    frozen: dict
    batch: Sequence
    compiled: jax.stages.Compiled
    metrics: dict | None = None

    def run(self) -> dict:
        self.state, self.metrics = self.compiled(self.state, self.frozen, self.batch)
        return jax.block_until_ready(self.metrics)


def build(config: ConfigDict, stage: str | int | None, folder: str | Path) -> Program:
    """The step as the loop compiles it, with fresh weights and one real batch. `folder` is only named, never made."""
    trainer, stage = Trainer(config, folder), chosen(config, stage)
    cfg = config.stages[stage.name]
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    trees = ("frozen", "trainable") if "vlm" in stage.trains else ("trainable", "frozen")
    with jax.set_mesh(trainer.mesh):
        params, rest = (trainer._fresh(tree) for tree in trees)
        make = partial(new_state, stage=stage, optimizer=optimizer, key=jax.random.key(config.seed))
        layout = sharding.tree_shardings(jax.eval_shape(make, params), trainer.mesh)
        state = jax.jit(make, out_shardings=layout)(params)
        batch = jax.device_put(next(data(trainer, stage)), sharding.batch_sharding(trainer.mesh))
        compiled = trainer._compile(stage, optimizer).lower(state, rest, batch).compile()
    return Program(trainer, stage, state, rest, batch, compiled)
