"""Data of TPUs and GPUs from their makers' specifications, and topologies.

v5p:4x4x4 is a slice, v6e:16x16:4 are four slices, h100:8x8 are 8 nodes of 8 GPUs.
"""

import math
import re
from dataclasses import dataclass

import jax
import numpy as np

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
    network: float = 0  # bytes/s between slices in one direction, for each chip; 0: the documentation does not tell it


# The documentation gives the bandwidth of all links of a chip together, both directions added: 400 GB/s for the 4 links
# of a v5e, 800 for the 4 of a v6e, 1200 for the 6 of a v5p. For a v4 it gives 6 links of 50 GB/s in each direction.
# The network between slices is 6.4 Tbit/s for the 256 chips of a v5e, 25.6 for those of a v6e, and 50 Gbit/s for each
# v5p.
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * 2**30, 1228e9, 50e9, 3, 4, 4, 4096),
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 50e9, 2, 16, 4, 256, 3.125e9),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 100e9, 3, 4, 4, 8960, 6.25e9),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1638e9, 100e9, 2, 16, 4, 256, 12.5e9),
}


SHARE = 0.95  # of a GPU's memory that plans may fill, as XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 sets it in a run


@dataclass(frozen=True)
class Gpu:
    """Peak rates of an NVIDIA GPU, and what its compiler must know of it."""

    name: str
    kind: str  # JAX's `device_kind`
    flops: float  # dense bf16 FLOP/s
    installed: float  # bytes of memory, as the driver counts them
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s over NVLink in one direction
    network: float  # bytes/s between nodes in one direction, for each GPU
    most: int  # GPUs that NVLink joins; here they are called a node
    capability: tuple[int, int]  # compute capability
    cores: int  # streaming multiprocessors
    clock: float  # GHz
    units: int  # fp32 units of a core
    shared: int  # bytes of shared memory of a core
    cache: int  # bytes of the L2 cache

    @property
    def memory(self) -> float:
        """Bytes that a program may use."""
        return SHARE * self.installed


# FLOP/s (dense: half of what the data sheets give with sparsity), memory bandwidth and NVLink (half of the sum of both
# directions) are from NVIDIA's data sheets of the A100, the H100, the H200, the HGX B200 and the GB200 NVL72, always of
# the SXM module. Networks are those of NVIDIA's own machines: one adapter for each GPU, of 200 Gbit/s in a DGX A100 and
# of 400 in the others. The last six columns, and the memory, are device properties as the specifications of GPUs in
# XLA's repository list them (xla/backends/gpu/target_config/specs); the memory of the H200 is what nvidia-smi showed on
# one. The RTX 4090 is from NVIDIA's paper on its Ada architecture, with sums in fp32; it has no NVLink, so it is a node
# alone.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", "NVIDIA A100-SXM4-40GB", 312e12, 42331013120, 1555e9, 300e9, 25e9, 8, (8, 0), 108, 1.41, 64, 167936, 40 << 20),
        Gpu("a100-80", "NVIDIA A100-SXM4-80GB", 312e12, 85100068864, 2039e9, 300e9, 25e9, 8, (8, 0), 108, 1.41, 64, 167936, 40 << 20),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 989e12, 84942979072, 3350e9, 450e9, 50e9, 8, (9, 0), 132, 1.98, 128, 233472, 50 << 20),
        Gpu("h200", "NVIDIA H200", 989e12, 143771 << 20, 4800e9, 450e9, 50e9, 8, (9, 0), 132, 1.98, 128, 233472, 50 << 20),
        Gpu("b200", "NVIDIA B200", 2250e12, 191514411008, 8000e9, 900e9, 50e9, 8, (10, 0), 148, 1.965, 128, 233472, 132644864),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 165.2e12, 24564 << 20, 1008e9, 32e9, 25e9, 1, (8, 9), 128, 2.52, 128, 102400, 72 << 20),
        Gpu("gb200", "NVIDIA GB200", 2500e12, 197897748480, 8000e9, 900e9, 50e9, 72, (10, 0), 152, 2.062, 128, 233472, 135528448),
    )
}  # fmt: skip


# Dense bfloat16 FLOP/s of one device, by the makers' tables; names are JAX's `device_kind`.
PEAK_FLOPS = {gpu.kind: gpu.flops for gpu in GPUS.values()} | {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": 2307e12,
}


def peak_flops(configured: float = 0.0) -> float | None:
    """FLOP/s of one device: `configured` if it is not 0, else the table's; None for an unknown device, such as a
    CPU.
    """
    return configured or PEAK_FLOPS.get(jax.devices()[0].device_kind)


def compute_capability(kind: str) -> tuple[int, int] | None:
    """Compute capability of a GPU that the table or this machine has; `kind`: JAX's `device_kind`. None: not known."""
    known = {gpu.kind: gpu.capability for gpu in GPUS.values()}
    here = jax.devices()[0]
    if here.device_kind == kind and isinstance(version := getattr(here, "compute_capability", None), str):
        major, minor = version.split(".")
        return int(major), int(minor)
    return known.get(kind)


@dataclass(frozen=True)
class Topology:
    """TPUs in slices, each a torus of a shape, or GPUs: (nodes, GPUs of a node)."""

    chip: Chip | Gpu
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips."""
        return self.slices * math.prod(self.shape)

    @property
    def slice(self) -> str:
        """The name of one slice."""
        shape = self.shape[1:] if isinstance(self.chip, Gpu) and self.shape[0] == 1 else self.shape
        return f"{self.chip.name}:{'x'.join(map(str, shape))}"

    def __str__(self) -> str:
        return f"{self.slice}:{self.slices}" if self.slices > 1 else self.slice

    def places(self, devices: list) -> np.ndarray:
        """(chips, dimensions): where each of JAX's devices lies in `shape`, that of its slice; in raster order where
        they do not say it."""
        if not hasattr(devices[0], "coords"):
            return np.array(np.unravel_index(np.arange(len(devices)), self.shape)).T
        first = 1 if isinstance(self.chip, Gpu) else 0  # GPUs: (slice, node, GPU)
        return np.array([d.coords[first : first + len(self.shape)] for d in devices])

    def send_rate(self, places: np.ndarray, to_neighbour: bool) -> float:
        """Bytes/s that each chip of a group sends in a collective of a ring algorithm. places: (chips, dimensions).

        A TPU sends over a link for each dimension along which the group lies, two if the group closes that dimension.
        GPUs send over NVLink within a node. Between nodes, the ring passes each pair of nodes through the adapters of
        all GPUs that the group has in a node. to_neighbour: each chip sends to one other only.
        """
        sizes = [len(set(column)) for column in places.T]
        if isinstance(self.chip, Gpu):
            nodes, each = sizes[0], len(places) // sizes[0]
            return (
                self.chip.link if nodes == 1 else min(self.chip.link, self.chip.network * (1 if to_neighbour else each))
            )
        along = [d for d, size in enumerate(sizes) if size > 1]
        if to_neighbour or not along:
            return 2 * self.chip.link  # in both directions at once
        rings = [d for d in along if sizes[d] == self.shape[d] and self.shape[d] % self.chip.wraps == 0]
        return self.chip.link * (len(along) + len(rings))


def parse_topology(text: str) -> Topology:
    """The topology that a text such as "v5p:4x4x4", "v6e:16x16:4" or "h100:8x8" names.

    Raises UserError, with the nearest that exists.
    """
    name, _, sizes = text.partition(":")
    slices = ""
    if name in CHIPS:
        sizes, _, slices = sizes.partition(":")
    given = tuple(map(int, sizes.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
    if name in GPUS:
        return _cluster(GPUS[name], given, sizes)
    chip = CHIPS.get(name)
    if chip is None:
        known = (*CHIPS, *GPUS)
        near = next((c for n in (3, 2, 1) for c in known if name[:n] == c[:n]), "v5p")
        like = cluster_of(GPUS[near], count(sizes)) if near in GPUS else shape_of(CHIPS[near], count(sizes))
        meant = Topology(GPUS.get(near) or CHIPS[near], like)
        raise UserError(f"there is no TPU or GPU {name!r} ({', '.join(known)}); did you mean {meant}?")
    right = shape_of(chip, count(sizes))
    if given != right and not _is_built(chip, given):
        raise UserError(
            f"{chip.name} has no topology {sizes!r}: it is {' x '.join('XYZ'[: chip.dimensions])} chips, as in "
            f"{Topology(chip, right)}"
        )
    if slices and not re.fullmatch(r"[1-9]\d{0,2}", slices):
        raise UserError(f"{text!r} must end with the number of slices, from 1 to 999, as in {Topology(chip, given, 4)}")
    if slices not in ("", "1") and not chip.network:
        raise UserError(
            f"the speed of the network between slices of {chip.name} is not known; plan for {Topology(chip, given)}"
        )
    return Topology(chip, given, int(slices or 1))


def _cluster(gpu: Gpu, given: tuple[int, ...], sizes: str) -> Topology:
    """Nodes of GPUs: (8,) is one node, (4, 8) are four."""
    if len(given) not in (1, 2) or given[-1] > gpu.most:
        near = Topology(gpu, cluster_of(gpu, count(sizes)))
        raise UserError(
            f"{gpu.name} has no topology {sizes!r}: it is GPUs, or nodes x GPUs, with at most {gpu.most} GPUs in a "
            f"node, as in {near}"
        )
    return Topology(gpu, (1, *given)[-2:])


def cluster_of(gpu: Gpu, gpus: int) -> tuple[int, int]:
    """(nodes, GPUs per node): the fewest full nodes with at least `gpus` GPUs, or a part of one node."""
    return (-(-gpus // gpu.most), gpu.most) if gpus > gpu.most else (1, gpus)


def count(sizes: str) -> int:
    """A guess of how many chips a malformed topology means: the product of the numbers in it, or 64 if there are
    none.
    """
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
