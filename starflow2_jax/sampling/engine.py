"""Generation: documents in, documents out. What the model writes enters both streams' caches and is never run again."""

import logging
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from starflow2_jax.checkpoints.directory import CheckpointDirectory, CheckpointError, abstract
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Document
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.errors import UserError
from starflow2_jax.models.jacobi import SEQUENTIAL, Jacobi, Schedule
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, for_sampling, init_params, split
from starflow2_jax.parallel import sharding
from starflow2_jax.sampling.rows import SampleOptions, power, rounded
from starflow2_jax.sampling.session import Session
from starflow2_jax.stages import find_saved

__all__ = ["AS_TRAINED", "DTYPES", "SampleOptions", "Sampler", "Session", "in_type", "weights_in_type"]
DTYPES = ("float32", "bfloat16")
AS_TRAINED = SampleOptions()
log = logging.getLogger(__name__)


class Sampler:
    """A model, its parameters, tokenizer and codec. `skips`: whether the stage that made the parameters opened them."""

    schedule: Schedule | None = None  # how the shallow flow is inverted; None: token by token
    deep: Jacobi = SEQUENTIAL  # how the deep flow is, where SampleOptions.jacobi does not say
    noise: float = 0.0  # deviation of the noise that images had in training, in their units
    step: int | None = None  # of the checkpoint

    def __init__(
        self, model: Pretzel, params: dict, tokenizer, codec, skips: bool = True, max_positions: int = 4096, mesh=None
    ):
        scanned = model.cfg.deep.scan  # as trained
        self.model = Pretzel(for_sampling(model.cfg))
        self.params = separate_layers(params) if scanned else params
        self.tokenizer, self.codec, self.skips = tokenizer, codec, skips
        self.max_positions = max_positions
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.encoder = Encoder(tokenizer, codec, model.cfg.vlm.vision)
        self.ids = TokenIds.of(tokenizer)
        self.programs: set[tuple] = set()  # what was compiled so far, by program and shapes

    @classmethod
    def restore(cls, folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None) -> "Sampler":
        """From a checkpoint directory alone, its latest step. Raises CheckpointError.

        `mesh`: rows and parameters lie on it as in training; None: rows spread over all devices. `dtype`: of matrices and
        caches, one of DTYPES; None: as in the config.
        """
        if dtype not in (None, *DTYPES):
            raise UserError(f"dtype is {' or '.join(DTYPES)}, not {dtype!r}")
        checkpoints = CheckpointDirectory(folder)
        config, number = checkpoints.config(), checkpoints.require_latest()
        cfg = configs.pretzel(config)
        model = Pretzel(in_type(cfg, dtype) if dtype else cfg)
        mesh = mesh or sharding.make_mesh(fsdp=1, tensor=1)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        frozen, trainable = (abstract(tree, mesh) for tree in split(shapes))
        stage = find_saved(checkpoints.meta(number)["stage"])
        if set(stage.trains) <= set(frozen):
            raise CheckpointError(f"{folder} has only pretrained its VLM so far; train on before sampling")
        params = checkpoints.restore(number, {"params": trainable})["params"] | checkpoints.restore_frozen(frozen)
        moving = {name: trainable[name] for name in stage.trains}
        if checkpoints.has(number, "ema"):
            params |= checkpoints.restore(number, {"ema": moving})["ema"]
        if dtype:
            params = weights_in_type(params, dtype)
        for name in list(params):  # one by one: no more than one group is in memory twice
            params[name] = separate_layers(params.pop(name))
        codec, tokenizer = checkpoints.codec(), checkpoints.tokenizer()
        model = Pretzel(for_sampling(model.cfg))
        sampler = cls(model, params, tokenizer, codec, stage.skips, config.max_positions, mesh)
        if solvers := checkpoints.inversion(model.cfg.shallow_blocks + 1, number):
            *shallow, sampler.deep = solvers
            sampler.schedule = tuple(shallow)
        sampler.noise, sampler.step = config.noise, number
        return sampler

    def place(self, tree):
        """Host arrays that lead with rows, on the mesh: over its data and fsdp axes."""
        if self.mesh.size == 1:
            return tree  # the compiled function that takes them is faster at it
        return jax.device_put(tree, sharding.row_shardings(tree, self.mesh))

    def session(self, options: SampleOptions | Many[SampleOptions], seeds: Many[int], rows: int = 0) -> Session:
        """One empty conversation a seed. `rows`: run at least so many, idle ones behind them."""
        return Session(self, options, seeds, rows)

    def generate(
        self,
        prompts: list[Document],
        options: SampleOptions | Many[SampleOptions] = AS_TRAINED,
        seed: int | Many[int] = 0,
        samples: int = 1,
        rows: int = 0,
    ) -> list[Document]:
        """Continue each prompt `samples` times, until the answer ends itself or `max_tokens` are written.

        Returns what was written, prompts left out, the samples of a prompt side by side. Answer i is drawn with
        seed + i, or with seed[i] where several are given: the same alone, in any batch, on any mesh. A prompt is read once
        for all of its samples. `rows`: prompts of the largest of several calls, whose programs this one then shares.
        Raises DocumentError for a prompt that does not fit the model.
        """
        if not prompts:
            return []
        seeds = list(seed) if isinstance(seed, Many) else [seed + i for i in range(len(prompts) * samples)]
        rows = max(rows, len(prompts))
        session = self.session(options, seeds[::samples], rounded(rows))
        session.read(prompts, room=session.to_write)
        if samples > 1:
            session = session.fork(np.repeat(np.arange(len(prompts)), samples), seeds, rounded(rows * samples))
        return session.write()

    def decode(self, u: jax.Array | np.ndarray, calibrated: bool = True) -> np.ndarray:
        """u (n, N, D) -> pixels (n, height, width, C), not clipped. `calibrated`: by the schedule that the checkpoint was
        calibrated to, if it was; else token by token."""
        u = np.asarray(u)
        count, (h, w) = len(u), self.model.cfg.grid
        u = np.concatenate([u, np.zeros((power(count) - count, *u.shape[1:]), u.dtype)])  # few numbers are compiled
        schedule = self.schedule if calibrated else None
        self.uses(("decode", schedule, u.shape), f"the decoding of {len(u)} images")
        latents = np.asarray(self.run(_decode, self.model, schedule, self.params, self.place(u)))[:count]
        return np.asarray(self.codec.decode(latents.reshape(-1, h, w, latents.shape[-1])))

    def pictures(self, u: jax.Array, begins: list[list[int]], calibrated: bool = True) -> list[dict[int, np.ndarray]]:
        """Pixels of the images that begin at `begins` (a list a row) in u (B, T, D), by where each begins; `calibrated` as in
        `decode`, which takes all of them at once."""
        found: list[dict[int, np.ndarray]] = [{} for _ in begins]
        if places := [(row, at) for row, some in enumerate(begins) for at in some]:
            row, at = np.array(places).T
            tokens = np.asarray(u)[row[:, None], at[:, None] + np.arange(self.model.cfg.tokens)]
            for (row, at), pixels in zip(places, self.decode(tokens, calibrated), strict=True):
                found[row][at] = pixels
        return found

    def run(self, compiled, *arguments):
        """A compiled function on the sampler's mesh, which is where its layouts hold (`sharding.constrain`)."""
        with jax.set_mesh(self.mesh):
            return compiled(*arguments)

    def uses(self, program: tuple, what: str) -> None:
        """Note a program that is about to run, and say so where it must be compiled first."""
        if program not in self.programs:
            self.programs.add(program)
            log.info("compiling %s", what)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(model: Pretzel, schedule: Schedule | None, params, u):
    return model.apply({"params": params}, u, schedule, method=Pretzel.decode)


def in_type(cfg: PretzelConfig, dtype: str) -> PretzelConfig:
    """The same model with its matrix products and caches in another type."""
    vision = cfg.vlm.vision and replace(cfg.vlm.vision, dtype=dtype)
    vlm = replace(cfg.vlm, dtype=dtype, vision=vision)
    return replace(cfg, vlm=vlm, shallow=replace(cfg.shallow, dtype=dtype), deep=replace(cfg.deep, dtype=dtype))


def weights_in_type(params: dict, dtype: str) -> dict:
    """Stacks and embeddings in `dtype`; norms and what makes the Gaussians stay as they are."""

    def leaf(path, x):
        name = sharding.path_name(path)
        matrix = "/layers" in name and name.endswith("kernel")
        return x.astype(dtype) if matrix or name.endswith("embedding") else x

    return jax.tree_util.tree_map_with_path(leaf, params)
