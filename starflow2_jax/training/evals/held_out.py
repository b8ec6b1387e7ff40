"""Measures the losses of the parameters, and of their moving average, on held-out documents. Documents and noise are
the same every time."""

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.codecs.protocol import level_bits
from starflow2_jax.data.sources import held_out_streams
from starflow2_jax.parallel import processes
from starflow2_jax.random_streams import stream_key
from starflow2_jax.sequence import Sequence
from starflow2_jax.training import losses, program
from starflow2_jax.training.evals.batches import HeldOutBatches
from starflow2_jax.training.evals.protocol import Findings
from starflow2_jax.training.stage_task import StageTask
from starflow2_jax.training.step import TrainState, encoded, in_parts, loss_sums

Sums = Mapping[str, Any]  # of "image" and "text" in nats, and of "image_count" (dimensions) and "text_count" (tokens)


class HeldOutLosses:
    """See protocol.Evaluator. Its numbers (those of images or text are left out if no document has any):

    loss          the stage's loss: nats per latent dimension + text_weight * nats per token
    image_nats    negative log-density of the images, in nats per dimension, as `starflow2 score` gives it
    image_bits    the same in bits per dimension, if the codec is lossless
    text_nats     nats per token

    "ema_NAME" is of the moving average, and "NAME/SOURCE" of one source.
    """

    def __init__(self, name: str, config: Any, task: StageTask, folder: Path):
        self.name, self.task = name, task
        streams = held_out_streams(task.config, config.mix, task.stage, task.codec, task.tokenizer)
        self.batches = HeldOutBatches(streams, task.reader, config.batches, task.mesh)
        self.measure = jax.jit(partial(_measure, task))
        self.said: set[str] = set()

    def __call__(self, number: int, state: TrainState, frozen: dict[str, Any]) -> Findings:
        """See protocol.Evaluator."""
        trees = {"": frozen | state.params, "ema_": frozen | state.params | state.ema}
        found: dict[str, float] = {}
        together: dict[str, Counter[str]] = {prefix: Counter() for prefix in trees}
        for source in self.batches.readers:
            sums = self._sums(source, trees)
            if not any(value for name, value in sums[""].items() if name.endswith("_count")):
                self._warn(source)
            for prefix, own in sums.items():
                together[prefix].update(own)
                found |= {f"{prefix}{name}/{source}": value for name, value in self._numbers(own).items()}
        for prefix, own in together.items():
            found |= {f"{prefix}{name}": value for name, value in self._numbers(own).items()}
        return Findings(dict(sorted(found.items())))

    def _sums(self, source: str, trees: dict[str, dict[str, Any]]) -> dict[str, Counter[str]]:
        """The sums over all batches of a source, for each tree of parameters."""
        totals: dict[str, Counter[str]] = {prefix: Counter() for prefix in trees}
        running: dict[str, Sums] = {}
        key = stream_key(0, "held out", source)
        for i, batch in enumerate(self.batches.of(source)):
            before, running = (
                running,
                {prefix: self.measure(params, batch, jax.random.fold_in(key, i)) for prefix, params in trees.items()},
            )
            _add(totals, before)  # waits for it, so that few batches are on the devices at once
        _add(totals, running)
        return totals

    def _numbers(self, sums: Sums) -> dict[str, float]:
        codec, cfg, found = self.task.codec, self.task.cfg, {}
        if dimensions := sums["image_count"]:
            loss = sums["image"] / dimensions
            nats = loss + 0.5 * math.log(2 * math.pi) - (codec.log_volume or 0.0)
            found["image_nats"] = nats
            if codec.log_volume is not None:
                found["image_bits"] = nats / math.log(2) + level_bits(codec)
            found["loss"] = loss
        if tokens := sums["text_count"]:
            found["text_nats"] = sums["text"] / tokens
            found["loss"] = found.get("loss", 0.0) + cfg.text_weight * found["text_nats"]
        return found

    def _warn(self, source: str) -> None:
        if source not in self.said and processes.primary():
            self.said.add(source)
            print(
                f"WARNING: evals.{self.name} leaves out the source {source!r} in stage {self.task.name}: nothing in "
                f"its first documents counts in the stage's loss and fits into its rows",
                file=sys.stderr,
            )


def _add(totals: dict[str, Counter[str]], sums: dict[str, Sums]) -> None:
    for prefix, own in sums.items():
        totals[prefix].update({name: float(value) for name, value in own.items()})


def _measure(task: StageTask, params: dict[str, Any], batch: Sequence, key: jax.Array) -> dict[str, jax.Array]:
    """The Sums of a batch, in the stage's micro-batches. `key` is for the noise that training adds to latents, too."""
    objective = replace(program.objective(task.config, task.stage, task.codec.std), latent_penalty=0.0)
    batch = encoded(task.codec, params, batch, task.cfg.accumulate)
    batch = batch.replace(latents=batch.latents + objective.noise * jax.random.normal(key, batch.latents.shape))

    def sums(part: Sequence) -> dict[str, jax.Array]:
        nats, counts = loss_sums(task.model, params, task.stage, part, objective, None), losses.counts(part)
        found = {
            "image": jnp.zeros(()),
            "text": jnp.zeros(()),
            "image_count": jnp.zeros(()),
            "text_count": jnp.zeros(()),
        }
        return found | nats | {f"{name}_count": counts[name] for name in nats}

    return jax.tree.map(jnp.sum, jax.lax.map(sums, in_parts(batch, task.cfg.accumulate)))
