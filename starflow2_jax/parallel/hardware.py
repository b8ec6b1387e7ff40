"""TPUs and GPUs: peak rates by their makers' tables, and the topologies of TPUs, such as v5p:4x4x4."""

import math
import re
from dataclasses import dataclass

import jax

from starflow2_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Peak rates of a chip, from the specifications on docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e."""

    name: str
    flops: float  # bf16 FLOP/s
    memory: float  # bytes of HBM
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s of one interconnect link in one direction
    dimensions: int  # of the torus; a chip has two links along each
    wraps: int  # the torus closes along a dimension whose size is a multiple of this
    chips_a_host: int
    most: int  # chips in a pod


# The documentation gives the bandwidth of all links of a chip together, both directions added: 400 GB/s for the 4 links
# of a v5e, 800 for the 4 of a v6e, 1200 for the 6 of a v5p. For a v4 it gives 6 links of 50 GB/s in each direction.
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * 2**30, 1228e9, 50e9, 3, 4, 4, 4096),
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 50e9, 2, 16, 4, 256),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 100e9, 3, 4, 4, 8960),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1638e9, 100e9, 2, 16, 4, 256),
}


# Dense bfloat16 FLOP/s of one device, by the makers' tables; names are JAX's `device_kind`.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(configured: float = 0.0) -> float | None:
    """FLOP/s of one device: `configured` if it is not 0, else the table's; None for an unknown device, such as a CPU."""
    return configured or PEAK_FLOPS.get(jax.devices()[0].device_kind)


@dataclass(frozen=True)
class Topology:
    """A slice: chips of one kind in a torus of a shape."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def closes(self, dimension: int) -> bool:
        """Whether the chips along a dimension form a ring."""
        return self.shape[dimension] % self.chip.wraps == 0


def parse_topology(text: str) -> Topology:
    """The topology that a text such as "v5p:4x4x4" names. Raises UserError, with the nearest topology that exists."""
    name, _, sizes = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        near = next((c for c in CHIPS if name[:3] == c[:3]), next((c for c in CHIPS if name[:2] == c[:2]), "v5p"))
        shape = shape_of(CHIPS[near], count(sizes))
        raise UserError(f"there is no TPU {name!r} ({', '.join(CHIPS)}); did you mean {Topology(CHIPS[near], shape)}?")
    given = tuple(map(int, sizes.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
    right = shape_of(chip, count(sizes))
    if given != right and not _is_built(chip, given):
        raise UserError(
            f"{chip.name} has no topology {sizes!r}: it is {' x '.join('XYZ'[: chip.dimensions])} chips, as in "
            f"{Topology(chip, right)}"
        )
    return Topology(chip, given)


def count(sizes: str) -> int:
    """The number of chips that a malformed topology may mean: the product of its numbers, 64 without any."""
    numbers = [int(n) for n in re.findall(r"\d+", sizes)]
    return max(1, math.prod(numbers)) if numbers else 64


def _is_built(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether there are slices of this shape.

    Flat tori have sides of powers of two, up to 16 x 16. 3D tori of several hosts have sides of multiples of 4, the
    smaller ones first.
    """
    if len(shape) != chip.dimensions or math.prod(shape) > chip.most:
        return False
    if chip.dimensions == 2:
        return max(shape) <= 16 and all(s & (s - 1) == 0 for s in shape) and shape[0] <= 2 * shape[1] <= 4 * shape[0]
    return shape == tuple(sorted(shape)) and (all(s % 4 == 0 for s in shape)) or shape in SMALL


SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # 3D slices below 4 x 4 x 4


def shape_of(chip: Chip, chips: int) -> tuple[int, ...]:
    """The shape with the nearest number of chips that there are slices of; among those the most cubic."""
    sides = [2**i for i in range(int(math.log2(chip.most)) + 1)]
    grids = [(a, b) for a in sides for b in sides]
    if chip.dimensions == 3:
        grids = [(a, b, c) for a, b in grids for c in sides if a * b * c <= chip.most]
    built = [g for g in grids if _is_built(chip, g)]
    return min(built, key=lambda g: (abs(math.log(math.prod(g) / min(chips, chip.most))), max(g) / min(g), g))
