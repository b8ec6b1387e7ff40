"""An experiment outside the package that brings a codec, a source, a benchmark and a stage of its own.

Launch: starflow2 train --config squares.py --out runs/squares
        starflow2 eval --import squares.py --benchmark squares --checkpoint runs/squares --out runs/squares_report
"""

import json
from dataclasses import asdict, dataclass
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.sources import SOURCES
from starflow2_jax.evaluation.protocol import Benchmark, Task
from starflow2_jax.evaluation.table import BENCHMARKS
from starflow2_jax.fields import option
from starflow2_jax.models.patches import patchify, unpatchify
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.stages import STAGES, Stage


@dataclass(frozen=True)
class PcaOptions:
    patch: int = option("side of a patch, in pixels", 4, least=1)
    channels: int = option("principal components that are kept of a patch", 6, least=1)
    image_channels: int = option("channels of an image: 1 gray, 3 red, green and blue", 1, least=1, most=3)

    def image_shape(self, grid):
        return grid[0] * self.patch, grid[1] * self.patch, self.image_channels


class PcaCodec(Codec):
    """The strongest principal components of patches: lossy, so it has no log-volume, and with weights."""

    kind = "pca"
    Options = PcaOptions
    is_pixels = True
    log_volume = None

    def __init__(self, options, image_shape, weights):
        """weights: "mean" (P,) of a patch, "basis" (P, D) and "std" (D,) of a component."""
        self.options, self.image_shape, self.weights = options, tuple(image_shape), weights
        self.image_channels, self.channels = options.image_channels, options.channels
        self.grid = (image_shape[0] // options.patch, image_shape[1] // options.patch)
        self.mean, self.std = (0.0,) * self.channels, tuple(weights["std"].tolist())

    @classmethod
    def make(cls, options, images):
        images = np.stack(list(images))
        patches = patchify(images, options.patch).reshape(-1, options.image_channels * options.patch**2)
        mean = patches.mean(0)
        _, values, basis = np.linalg.svd(patches - mean, full_matrices=False)
        std = np.maximum(values[: options.channels] / np.sqrt(len(patches)), 1e-2)
        weights = {"mean": mean, "basis": basis[: options.channels].T.copy(), "std": std.astype(np.float32)}
        return cls(options, images.shape[1:], weights)

    def encode(self, images):
        require_shape(images, self.image_shape, "pixels")
        return _encode(self.weights, self.options.patch, images)

    def decode(self, latents):
        return _decode(self.weights, self.options.patch, self.image_channels, latents)

    def description(self):
        return {"options": asdict(self.options), "image_shape": self.image_shape}

    @classmethod
    def restored(cls, description, weights):
        return cls(PcaOptions(**description["options"]), description["image_shape"], weights)


@partial(jax.jit, static_argnums=1)
def _encode(weights, patch, images):
    return (patchify(images, patch) - weights["mean"]) @ weights["basis"] / weights["std"]


@partial(jax.jit, static_argnums=(1, 2))
def _decode(weights, patch, channels, latents):
    return unpatchify(latents * weights["std"] @ weights["basis"].T + weights["mean"], patch, channels)


@dataclass(frozen=True)
class SquaresOptions:
    side: int = option("side of the largest square, in pixels", 4, least=1, most=8)


class Squares(Source):
    """White squares on black, 8 x 8 pixels, with captions that say the side."""

    Options = SquaresOptions

    def __init__(self, path, options):
        self.side = options.side

    def __len__(self):
        return 60

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return [Text(f"a square of side {(side := 1 + index % self.side)}"), Image(square(side, rng), generate=True)]


def square(side, rng):
    pixels = np.full((8, 8, 1), -1, np.float32)
    top, left = rng.integers(0, 9 - side, 2)
    pixels[top : top + side, left : left + side] = 1
    return pixels


class SquaresBenchmark(Benchmark):
    """How far the white area is from that of the square which was asked for."""

    samples = 2

    def __init__(self, data, limit):
        self.sides = json.loads(open(data).read())[:limit]

    def tasks(self):
        options = SampleOptions(image_temperature=0.5, max_tokens=6, image_first=True)
        return [Task(f"side {s}", [Text(f"a square of side {s}")], s * s, options) for s in self.sides]

    def export(self, answers, out):
        rows = [f"{a.task.key},{a.k},{a.document[0].pixels.mean():.3f}" for a in answers]
        (out / "squares.csv").write_text("\n".join(rows))

    def score(self, answers, sampler):
        errors = {a.task.key: abs((a.document[0].pixels.mean() + 1) * 32 - a.task.target) for a in answers}
        return {"area_error": {key: (float(error), 1.0) for key, error in errors.items()}}


CODECS["pca"] = PcaCodec
SOURCES["squares"] = Squares
BENCHMARKS["squares"] = SquaresBenchmark
DEEP = ("embed_u", "embed_slot", "embed_y", "deep", "deep_norm", "head")  # the shallow flow stays as it is
STAGES["deep_alone"] = Stage("deep_alone", DEEP, skips=False, deep=True, image_loss=True, text_loss=False)


def get_config(runlocal: bool = False) -> ConfigDict:
    c = configs.load("digits_quick", runlocal=True).unlock()
    c.cpu_devices = 8
    c.data, c.evals = dict(sources=dict(squares=dict(path="squares", side=3))), {}
    c.codec = dict(kind="pca", patch=4, channels=6, image_channels=1)
    c.model.grid, c.model.channels = (2, 2), 6
    for stage in c.stages.values():
        stage.mix = {}
    c.stages.deep_alone = c.stages.text_to_image.copy_and_resolve_references()
    for name in ("pretrain", "deep_alone"):
        c.stages[name].update(rows=8, length=64, images=4, patches=64, steps=2)
    c.stages.deep_alone.patches = 0
    c.order = ("pretrain", "deep_alone")
    return c
