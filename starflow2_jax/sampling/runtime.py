"""The runtime of sampling: a model with its parameters, tokenizer and codec, placed on a mesh."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.jacobi import Schedule
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.pretzel import Pretzel, apply, for_sampling
from starflow2_jax.parallel import sharding
from starflow2_jax.sampling.inversion import Inversion
from starflow2_jax.sampling.rows import Rows, power
from starflow2_jax.sampling.steps import Program
from starflow2_jax.sequence import Sequence

log = logging.getLogger(__name__)


class Runtime:
    """A model, its parameters, tokenizer and codec, and the mesh that they run on.

    `skips`: whether the stage that trained the parameters had its skips open. `max_positions`: largest length of a row.
    `mesh`: None for the first device alone. `inversion`: the solvers of both flows. `noise`: standard deviation of the
    noise that was added to images in training, in their units. `step`: the checkpoint's step.
    """

    def __init__(
        self,
        model: Pretzel,
        params: dict,
        tokenizer: Any,
        codec: Codec,
        skips: bool = True,
        max_positions: int = 4096,
        mesh: jax.sharding.Mesh | None = None,
        inversion: Inversion = Inversion(),  # noqa: B008 - it is frozen
        noise: float = 0.0,
        step: int | None = None,
    ):
        scanned = model.cfg.deep.scan  # as trained
        self.model = Pretzel(for_sampling(model.cfg))
        self.params = separate_layers(params) if scanned else params
        self.tokenizer, self.codec, self.skips = tokenizer, codec, skips
        self.max_positions = max_positions
        self.mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.schedule, self.deep = inversion.shallow, inversion.deep
        self.noise, self.step = noise, step
        self.encoder = Encoder(tokenizer, codec, model.cfg.vlm.vision)
        self.ids = TokenIds.of(tokenizer)
        self.programs: set[tuple] = set()  # programs compiled so far, with their shapes

    def place(self, tree: Any) -> Any:
        """Put host arrays whose first axis is rows onto the mesh, cut over its data and fsdp axes."""
        if self.mesh.size == 1:
            return tree  # a compiled function moves its arguments faster itself
        return jax.device_put(tree, sharding.row_shardings(tree, self.mesh))

    def decode(self, u: jax.Array | np.ndarray, calibrated: bool = True) -> np.ndarray:
        """Image tokens u (n, N, D) -> pixels (n, height, width, C), not clipped.

        `calibrated`: use the checkpoint's calibrated solvers, if it has any; else decode token by token.
        """
        u = np.asarray(u)
        count, (h, w) = len(u), self.model.cfg.grid
        u = np.concatenate([u, np.zeros((power(count) - count, *u.shape[1:]), u.dtype)])  # few batch sizes are compiled
        schedule = self.schedule if calibrated else None
        self.uses(("decode", schedule, u.shape), f"the decoding of {len(u)} images")
        latents = np.asarray(self.run(_decode, self.model, schedule, self.params, self.place(u)))
        return np.asarray(self.run(self.codec.decode, latents.reshape(-1, h, w, latents.shape[-1])))[:count]

    def pictures(self, u: jax.Array, begins: list[list[int]], calibrated: bool = True) -> list[dict[int, np.ndarray]]:
        """Decode all images in the records u (B, T, D) at once.

        `begins` lists the positions where each row's images begin.

        Returns for each row a dict from that position to the pixels. `calibrated`: see `decode`.
        """
        found: list[dict[int, np.ndarray]] = [{} for _ in begins]
        if places := [(row, at) for row, some in enumerate(begins) for at in some]:
            row, at = np.array(places).T
            tokens = np.asarray(u)[row[:, None], at[:, None] + np.arange(self.model.cfg.tokens)]
            for (row, at), pixels in zip(places, self.decode(tokens, calibrated), strict=True):
                found[row][at] = pixels
        return found

    def run(self, compiled: Callable[..., Any], *arguments: Any) -> Any:
        """Call a jitted function under `jax.set_mesh` of the sampler's mesh, which `sharding.constrain` needs."""
        with jax.set_mesh(self.mesh):
            return compiled(*arguments)

    def uses(self, program: tuple, what: str) -> None:
        """Log `what` if this program (a hashable key with its shapes) has not run before and must be compiled first."""
        if program not in self.programs:
            self.programs.add(program)
            log.info("compiling %s", what)

    def run_step(self, program: Program, compiled: Any, rows: Rows, *arguments: Any) -> Rows:
        """Run `steps.read` or `steps.write` on rows; logs it if it must be compiled first."""
        shapes = tuple(getattr(x, "shape", x) for x in jax.tree.leaves((rows, arguments)))
        of = _described(arguments[0]) if isinstance(arguments[0], Sequence) else ""
        what = f"{compiled.__name__}{of} for {len(rows.done)} rows with room for {rows.caches.capacity} positions"
        self.uses((compiled.__name__, program, shapes), what)
        return self.run(compiled, program, self.params, rows, *arguments)


def _described(batch: Sequence) -> str:
    """The sizes of a batch, for the log."""
    patches = 0 if batch.vision is None else batch.vision.patches.shape[1]
    return f" of {batch.tokens.shape[1]} positions, {batch.latents.shape[1]} images and {patches} patches"


@partial(jax.jit, static_argnums=(0, 1))
def _decode(model: Pretzel, schedule: Schedule | None, params: dict, u: jax.Array) -> jax.Array:
    """The shallow flow's inverse, u (B, N, D) -> latents (B, N, D)."""
    return apply(model, params, u, schedule, method=Pretzel.decode)
