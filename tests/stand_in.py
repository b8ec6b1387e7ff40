"""A Trainer whose step is a small stand-in, for tests of what happens around the steps."""

import json
import math
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import tiny
from tiny_experiment import tiny_config

from starflow2_jax.data import mixture
from starflow2_jax.data.documents import Text
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.training import program, stage_task
from starflow2_jax.training.loop import Trainer

BAD = "~"  # in a document: its batch makes the loss bad


def stand_in(model, stage, optimizer, objective, **_):
    """A step that adds the batch's number of tokens to a parameter; its loss is good but for batches with BAD in
    them.
    """
    bad = tiny.tokenizer().encode(BAD, add_special_tokens=False)[0]

    def step(state, frozen, batch):
        def add(path, x):
            return x + jnp.sum(batch.segments > 0) if path[0].key == "vlm" and x.ndim == 1 else x

        params = jax.tree_util.tree_map_with_path(add, state.params)
        good = 1.0 + 0.1 * jnp.cos(state.step * 1.7)
        loss = jnp.where(jnp.any(batch.tokens == bad), Documents.bad_loss, good)
        return state.replace(step=state.step + 1, params=params), {"loss": loss, "grad_norm": jnp.float32(1)}

    return step


class Documents:
    """Endless; document `bad` is the one with BAD in it. A batch of 8 rows holds about 40 of them."""

    bad, bad_loss = -1, math.nan

    def __len__(self) -> int:
        return 2**32

    def __getitem__(self, i: int):
        return [Text(f"document number {i} " + (BAD if i == self.bad else ""), predict=True)]


def with_stand_ins(monkeypatch, folder: Path, **changes) -> Trainer:
    monkeypatch.setattr(program, "make_step", stand_in)
    prepare = Preparation(SourceConfig(path="numbers"), ImageReader(1))
    stream = Stream("numbers", 1.0, Documents(), prepare, seed=0)
    monkeypatch.setattr(stage_task.sources, "streams", lambda *_: [stream])
    monkeypatch.setattr(
        mixture, "order", lambda stream: grain.MapDataset.range(len(stream.source)).repeat()
    )  # unshuffled
    c = tiny_config(order=("pretrain",), save_every=4, keep=3, **changes)
    c.stages.pretrain.update(steps=16, ema=0.5)
    return Trainer(c, folder)


def lines(t: Trainer) -> list[dict]:
    return [json.loads(line) for line in (t.checkpoints.folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


def applied(t: Trainer, number: int = 12) -> float:
    """How many tokens the applied steps up to a saved one had, as a parameter has counted them."""
    shapes = abstract(program.abstract_params(t.model, "frozen"), t.mesh)
    params = t.checkpoints.steps.restore(number, {"params": shapes})["params"]
    fresh = t.task("pretrain").fresh("frozen")
    counted = jax.tree.map(lambda a, b: float(jnp.max(a - b)) if a.ndim == 1 else 0.0, params["vlm"], fresh["vlm"])
    return max(jax.tree.leaves(counted))
