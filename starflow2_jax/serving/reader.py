"""Reads prompts piece by piece, and compiles programs for them beside the running batch."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from starflow2_jax.data.pipeline import collate
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import BUCKET, Rows, bucket, power
from starflow2_jax.sampling.steps import Program
from starflow2_jax.sequence import Shape

PIECE = 256  # positions of a prompt to read between two chunks of the running rows
PATIENCE = 0.05  # seconds between two looks at a compilation while no row writes


class Reader:
    """Reads pieces of prompts into rows of one, whose caches have `capacity` positions.

    A piece with pictures has at least PIECE positions, and its number of patches follows from that of its positions. So
    there are few shapes: each length is compiled without pictures, with flow images and with the vision tower. A shape
    that is new is compiled on a thread of its own, while the rows of the batch write on. `empty`: makes such a row.
    """

    def __init__(self, sampler: Sampler, capacity: int, empty: Callable[[], Rows]):
        self.sampler, self.capacity, self.empty = sampler, capacity, empty
        self.known: set[tuple[int, Shape]] = set()  # the lanes and shapes that have been compiled
        self.compiler = ThreadPoolExecutor(1, "compiler")

    def shape(self, piece: dict[str, np.ndarray], used: int) -> Shape:
        """The shape in which a piece is read after `used` positions of a row."""
        length, images = len(piece["tokens"]), len(piece["latents"])
        seen = len(piece.get("patches", ())) > 0
        room = bucket(max(length, PIECE) if images or seen else length)
        if used + room > self.capacity:
            room = rounded(length)
        cfg, vision = self.sampler.model.cfg, self.sampler.encoder.vision
        latents = 1 if images < 2 else power(max(images, room // (cfg.tokens + 2)))
        return Shape(1, room, latents, vision.merge**2 * room if seen and vision else 0)

    def read(
        self,
        program: Program,
        rows: Rows,
        lane: int,
        piece: dict[str, np.ndarray],
        used: int,
        busy: Callable[[], bool],
    ) -> Generator[None, None, Rows]:
        """Read a piece of a prompt into a lane that already holds `used` positions; returns the rows.

        Yields while another thread compiles. `busy`: whether the caller has other work meanwhile.
        """
        shape = self.shape(piece, used)
        if (lane, shape) not in self.known:
            compiling = self.compiler.submit(lambda: self._read(program, self.empty(), lane, piece, shape))
            while not compiling.done():
                if not busy():
                    wait([compiling], PATIENCE)
                yield
            compiling.result()  # raises its error
            self.known.add((lane, shape))
        return self._read(program, rows, lane, piece, shape)

    def _read(self, program: Program, rows: Rows, lane: int, piece: dict[str, np.ndarray], shape: Shape) -> Rows:
        length, end = len(piece["tokens"]), piece["positions"].max() + 1
        given = self.sampler.place((collate([piece], shape), np.array([length], np.int32), np.array([end], np.int32)))
        return self.sampler.run_step(program, steps.read, rows, given[0], lane, *given[1:])


def rounded(length: int) -> int:
    """`length` rounded up to a multiple of BUCKET."""
    return -(-length // BUCKET) * BUCKET
