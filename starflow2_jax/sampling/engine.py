"""The sampler: continues documents.

Whatever the model writes enters the caches of both streams and is never run again.
"""

from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.reading import CheckpointError
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Document
from starflow2_jax.errors import UserError
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, for_sampling, init_params, split
from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.sampling import inversion
from starflow2_jax.sampling.rows import SampleOptions, rounded
from starflow2_jax.sampling.runtime import Runtime
from starflow2_jax.sampling.session import Session
from starflow2_jax.stages import find_saved

DTYPES = ("float32", "bfloat16")
AS_TRAINED = SampleOptions()


class Sampler(Runtime):
    """Continues prompts with text and images."""

    @classmethod
    def restore(cls, folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None) -> "Sampler":
        """Make a sampler from a checkpoint directory alone, at its latest step.

        `mesh` holds rows and parameters as in training; None: all devices, which share the rows. `dtype`: type of
        matrices and caches, one of DTYPES; None: the config's. Raises CheckpointError, and UserError for another dtype.
        """
        if dtype not in (None, *DTYPES):
            raise UserError(f"dtype must be {' or '.join(DTYPES)}, not {dtype!r}")
        checkpoints = CheckpointDirectory(folder)
        config, number = checkpoints.config(), checkpoints.require_latest()
        cfg = configs.pretzel(config)
        model = Pretzel(in_type(cfg, dtype) if dtype else cfg)
        mesh = mesh or sharding.make_mesh(fsdp=1, tensor=1)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        frozen, trainable = (abstract(tree, mesh) for tree in split(shapes))
        stage = find_saved(checkpoints.steps.meta(number)["stage"])
        if set(stage.trains) <= set(frozen):
            raise CheckpointError(f"{folder} has only pretrained its VLM so far; train a later stage before sampling")
        params = checkpoints.steps.restore(number, {"params": trainable})["params"] | checkpoints.frozen.restore(frozen)
        moving = stage.trained(trainable)
        if checkpoints.steps.has(number, "ema"):
            params |= checkpoints.steps.restore(number, {"ema": moving})["ema"]
        if dtype:
            params = weights_in_type(params, dtype)
        for name in list(params):  # one group at a time, so that only one is in memory twice
            params[name] = separate_layers(params.pop(name))
        codec, tokenizer = checkpoints.codec(), checkpoints.tokenizer()
        model = Pretzel(for_sampling(model.cfg))
        return cls(
            model,
            params,
            tokenizer,
            codec,
            skips=stage.skips,
            max_positions=config.max_positions,
            mesh=mesh,
            inversion=inversion.read(checkpoints.folder, model.cfg.shallow_blocks + 1, number),
            noise=config.noise,
            step=number,
        )

    def session(self, options: SampleOptions | Many[SampleOptions], seeds: Many[int], rows: int = 0) -> Session:
        """A batch of empty conversations, one for each seed. `rows`: smallest size of the batch, filled up by idle
        rows.
        """
        return Session(self, options, seeds, rows)

    def generate(
        self,
        prompts: list[Document],
        options: SampleOptions | Many[SampleOptions] = AS_TRAINED,
        seed: int | Many[int] = 0,
        samples: int = 1,
        rows: int = 0,
    ) -> list[Document]:
        """Continue each prompt `samples` times, until the answer ends itself or has `max_tokens` positions.

        Returns the answers without their prompts; the samples of a prompt are neighbours. Answer i is drawn with
        seed + i, or with seed[i] if `seed` is a list; it depends on that seed and its prompt alone, not on the batch or
        the mesh. Each prompt is read once for all of its samples. `rows`: if there are several calls, the largest
        number of prompts in one of them, so that all calls use the programs that were compiled for it. Raises
        DocumentError for a prompt that does not fit the model.
        """
        if not prompts:
            return []
        seeds = [seed + i for i in range(len(prompts) * samples)] if isinstance(seed, int) else list(seed)
        rows = max(rows, len(prompts))
        session = self.session(options, seeds[::samples], rounded(rows))
        session.read(prompts, room=session.to_write)
        if samples > 1:
            session = session.fork(np.repeat(np.arange(len(prompts)), samples), seeds, rounded(rows * samples))
        return session.write()


def in_type(cfg: PretzelConfig, dtype: str) -> PretzelConfig:
    """The same model with its matrix products and caches in another type."""
    vision = cfg.vlm.vision and replace(cfg.vlm.vision, dtype=dtype)
    vlm = replace(cfg.vlm, dtype=dtype, vision=vision)
    return replace(cfg, vlm=vlm, shallow=replace(cfg.shallow, dtype=dtype), deep=replace(cfg.deep, dtype=dtype))


def weights_in_type(params: dict, dtype: str) -> dict:
    """Parameters with the layers' matrices and the embeddings in `dtype`; all others keep their types."""

    def leaf(path, x):
        name = sharding.path_name(path)
        matrix = "/layers" in name and name.endswith("kernel")
        return x.astype(dtype) if matrix or name.endswith("embedding") else x

    return jax.tree_util.tree_map_with_path(leaf, params)
