"""Compares what a linear map reads off the encoder's features with what it reads off those that the codec makes
again.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.errors import ConfigError
from starflow2_jax.sequence import Sequence
from starflow2_jax.training.codec import measures, pictures
from starflow2_jax.training.codec.reconstruction import whole
from starflow2_jax.training.codec.step import CodecState
from starflow2_jax.training.codec.task import CodecTask
from starflow2_jax.training.evals.batches import HeldOutBatches
from starflow2_jax.training.evals.protocol import Findings


class Probe:
    """See protocol.Evaluator. Shares of test pictures whose class a ridge regression on features, averaged over tokens,
    finds:

    features         fitted to the encoder's features and tested on them
    reconstructed    fitted to the features that are made again of the latents' means, and tested on them
    transferred      fitted to the encoder's features and tested on those that are made again
    most_common      of the class that has the most pictures, without looking
    classes          their number

    Of the parameters' moving average. Every second picture is for the test.
    """

    def __init__(self, name: str, config: Any, task: CodecTask, folder: Path):
        self.name = name
        try:
            groups = re.compile(config.label).groups
        except re.error as error:
            raise ConfigError(f"evals.{name}.label is no regular expression ({error}); mend it") from None
        if groups != 1:
            raise ConfigError(f"evals.{name}.label has {groups} groups; give it one, which is the class")
        streams = pictures.held_out_streams(task.config, config.mix, task.networks.cfg, config.label)
        self.batches = HeldOutBatches(streams, partial(task.reader, labelled=True), config.batches, task.mesh)
        self.measure = jax.jit(partial(_measure, task))

    def __call__(self, number: int, state: CodecState, frozen: dict[str, Any]) -> Findings:
        """See protocol.Evaluator. Raises ConfigError if the pictures have fewer than two classes."""
        params = frozen | state.params | state.ema
        rows = []
        for batch in self.batches:
            there, *found = map(whole, self.measure(params, batch))
            rows.append([x[there] for x in found])
        x, again, classes = map(np.concatenate, zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
        _, counts = np.unique(classes, return_counts=True)
        if len(counts) < 2:
            raise ConfigError(
                f"evals.{self.name}: the pictures have {len(counts)} classes, and a probe tells at least two apart"
            )
        fit, test = slice(0, None, 2), slice(1, None, 2)
        found = {
            "features": measures.probe(x[fit], classes[fit], x[test], classes[test]),
            "reconstructed": measures.probe(again[fit], classes[fit], again[test], classes[test]),
            "transferred": measures.probe(x[fit], classes[fit], again[test], classes[test]),
            "most_common": float(counts.max() / counts.sum()),
            "classes": float(len(counts)),
        }
        return Findings(found)


def _measure(task: CodecTask, params: dict[str, Any], batch: Sequence) -> tuple[jax.Array, ...]:
    """Which rows hold a picture, its features and those that are made again, averaged over tokens, and its label."""
    n = task.networks
    x = n.features(params, pictures.pixels(batch, n.cfg))
    again = n.features_again(params, n.gaussian(params, x)[0])
    return jnp.max(batch.segments, 1) > 0, jnp.mean(x, 1), jnp.mean(again, 1), pictures.labels(batch, n.cfg)
