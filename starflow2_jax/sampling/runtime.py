"""What sampling runs on: a model with its parameters, tokenizer and codec, placed on a mesh."""

import logging
from functools import partial

import jax
import numpy as np

from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.jacobi import Schedule
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.pretzel import Pretzel, for_sampling
from starflow2_jax.parallel import sharding
from starflow2_jax.sampling.inversion import Inversion
from starflow2_jax.sampling.rows import Rows, power
from starflow2_jax.sampling.steps import Program

log = logging.getLogger(__name__)


class Runtime:
    """A model, its parameters, tokenizer and codec, and the mesh that all of it runs on.

    `skips`: whether the stage that made the parameters opened them. `max_positions`: of a row. `inversion`: how the flows
    are inverted. `noise`: deviation of the noise that images had in training, in their units. `step`: of the checkpoint.
    """

    def __init__(
        self,
        model: Pretzel,
        params: dict,
        tokenizer,
        codec,
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
        self.programs: set[tuple] = set()  # what was compiled so far, by program and shapes

    def place(self, tree):
        """Host arrays that lead with rows, on the mesh: over its data and fsdp axes."""
        if self.mesh.size == 1:
            return tree  # the compiled function that takes them is faster at it
        return jax.device_put(tree, sharding.row_shardings(tree, self.mesh))

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

    def run_step(self, program: Program, compiled, rows: Rows, *arguments) -> Rows:
        """`steps.read` or `steps.write` on rows, noted if it must be compiled first."""
        shapes = tuple(getattr(x, "shape", x) for x in jax.tree.leaves((rows, arguments)))
        what = f"{compiled.__name__} for {len(rows.done)} rows with room for {rows.caches.capacity} positions"
        self.uses((compiled.__name__, program, shapes), what)
        return self.run(compiled, program, self.params, rows, *arguments)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(model: Pretzel, schedule: Schedule | None, params, u):
    return model.apply({"params": params}, u, schedule, method=Pretzel.decode)
