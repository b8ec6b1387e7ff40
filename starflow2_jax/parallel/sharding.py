"""The mesh, and the rules that map array axes to mesh axes: ordered patterns, of which the first match counts."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from starflow2_jax.errors import UserError
from starflow2_jax.parallel.devices import start

# data: copies of the model, between slices; fsdp: rows and parameters; sequence: positions of a row; tensor: heads,
# hidden channels and words. Devices along a later axis are nearer to each other.
AXES = ("data", "fsdp", "sequence", "tensor")

# Names that the models use in constraints -> mesh axes.
LOGICAL = {
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "embed": None,
    "heads": "tensor",
    "hidden": "tensor",
    "words": "tensor",
}

# Parameter path -> mesh axes of its last dimensions; leading ones, such as the layers of a stack, stay whole.
PARAMETER_RULES = (
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", ("tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
    (r"(token_embedding|lm_head)/embedding$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", None)),
    (r".", ()),
)

# A width of 3072 over 64 devices leaves 48 channels each, whole tiles of a TPU's memory. Over 256 it leaves 12, and
# libtpu then all-reduces gradients, which sends twice what a reduce-scatter does.
MOST_FSDP = 64
LEAST = 2**24  # bytes of parameters that devices may hold whole without a word


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None, sequence: int = 1
) -> Mesh:
    """A mesh over `devices` (None: all). One size may be -1: all devices that the others leave.

    If data and fsdp are both -1, they share these devices: fsdp takes as many as `fsdp_of` allows, data the others.
    With devices of several slices the data axis spans the slices, and fsdp too if data is too short for all of them;
    the other axes stay within a slice. Within a slice, axes may share a dimension of the torus. Raises UserError for
    sizes that do not fit the devices.
    """
    devices = devices or start()
    count, fixed = len(devices), int(np.prod([s for s in (data, fsdp, sequence, tensor) if s > 0]))
    if data == fsdp == -1 and count % fixed == 0:
        fsdp = fsdp_of(devices, count // fixed)
        fixed *= fsdp
    sizes = [data, fsdp, sequence, tensor]
    if sizes.count(-1) > 1 or count % fixed or (-1 not in sizes and fixed != count):
        raise UserError(
            f"mesh data={data} fsdp={fsdp} sequence={sequence} tensor={tensor} does not fit {count} devices"
        )
    sizes = tuple(count // fixed if s == -1 else s for s in sizes)
    return Mesh(placed_devices(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fsdp_of(devices: Sequence, count: int) -> int:
    """The size of fsdp where it shares `count` devices with data: at most MOST_FSDP, within a slice of TPUs and a
    plane.

    libtpu gathers and reduce-scatters over two dimensions of a torus, and replaces both by all-reduces over three.
    """
    count //= len({getattr(device, "slice_index", 0) for device in devices})
    most = min(MOST_FSDP, count)
    if hasattr(devices[0], "coords"):
        sides = np.ptp([device.coords for device in devices], axis=0) + 1
        most = min(most, int(np.prod(np.sort(sides)[-2:])))
    return max((n for n in range(1, most + 1) if count % n == 0), default=1)


def placed_devices(sizes: tuple[int, ...], devices: Sequence) -> np.ndarray:
    """The devices as an array of `sizes`, one for each of AXES. Raises UserError if they cannot be laid out so."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    over_data = math.gcd(sizes[0], slices)
    over_fsdp = slices // over_data
    if sizes[1] % over_fsdp:
        raise UserError(
            f"the devices are of {slices} slices: data={sizes[0]} (or data and fsdp={sizes[1]} together) must be a "
            "multiple of that, so that sequence and tensor stay within a slice"
        )
    within, between = (sizes[0] // over_data, sizes[1] // over_fsdp, *sizes[2:]), (over_data, over_fsdp, 1, 1)
    split = {"allow_split_physical_axes": True}  # jax.make_mesh allows it on v5e only
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, **split)
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, **split)
    except (AssertionError, NotImplementedError, ValueError) as error:
        mesh, reason = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)), str(error)
        raise UserError(f"the devices cannot be laid out as a mesh {mesh} ({reason.splitlines()[0]})") from None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the layout of x, one name of LOGICAL (or None) for each axis, on the mesh of `jax.set_mesh`.

    Without a mesh, returns x as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = _fitting([LOGICAL.get(n) if n else None for n in names], x.shape, mesh.shape)
    return jax.lax.with_sharding_constraint(x, spec)


def axis_size(axis: str) -> int:
    """Size of an axis of the mesh of `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def constrain_parameter(x: jax.Array, path: str) -> jax.Array:
    """Pin a parameter, or an array made from it element by element, to the layout of PARAMETER_RULES for `path`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, _parameter_spec(path, x.shape, mesh.shape))


def _parameter_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """The axes of the first rule that matches.

    If fsdp does not divide its dimension, it goes to the last of the rule's free dimensions that it divides.
    """
    rule = _rule(path, shape)
    spec = list(_fitting((None,) * (len(shape) - len(rule)) + rule, shape, sizes))
    if "fsdp" in rule and "fsdp" not in spec:
        for dimension in range(len(shape) - 1, len(shape) - len(rule) - 1, -1):
            if spec[dimension] is None and shape[dimension] % sizes["fsdp"] == 0:
                spec[dimension] = "fsdp"
                break
    return PartitionSpec(*spec)


def _rule(path: str, shape: Sequence[int]) -> tuple:
    rule = next(axes for pattern, axes in PARAMETER_RULES if re.search(pattern, path))
    return tuple(rule[-len(shape) :]) if shape else ()


def held_whole(tree: Any, sizes: Mapping[str, int]) -> str:
    """Says which parameters every device holds whole, although a rule would cut them over fsdp, and what would cut
    them.

    Returns "" if they take less than LEAST bytes. tree: parameters, or their shapes. sizes: of the mesh, by axis.
    """
    whole = _uncut(tree, sizes)
    total = sum(whole.values())
    if total < LEAST:
        return ""
    fsdp = sizes["fsdp"]
    parts = (n for n in range(2, fsdp) if fsdp % n == 0)
    fits = next((n for n in parts if sum(_uncut(tree, {**sizes, "fsdp": fsdp // n}).values()) < LEAST), None)
    names = sorted(whole, key=lambda name: -whole[name])
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    change = f"; mesh.data={sizes['data'] * fits} with mesh.fsdp={fsdp // fits} cuts them" if fits else ""
    return (
        f"every device holds {total / 2**30:.2f} GiB of parameters whole, because fsdp={fsdp} divides no dimension of "
        f"{', '.join(names[:2])}{more}{change}"
    )


def _uncut(tree: Any, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes by path of the parameters that a rule would cut over fsdp, but that stay whole."""
    leaves = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    return {
        name: float(np.prod(x.shape, dtype=float) * x.dtype.itemsize)
        for name, x in leaves
        if sizes["fsdp"] > 1 and "fsdp" in _rule(name, x.shape) and "fsdp" not in _parameter_spec(name, x.shape, sizes)
    }


def _fitting(axes: Sequence, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """The axes as a spec, without those whose size does not divide their dimension."""

    def size(axis):
        return int(np.prod([sizes[a] for a in ((axis,) if isinstance(axis, str) else axis)])) if axis else 1

    return PartitionSpec(*(a if dim % size(a) == 0 else None for a, dim in zip(axes, shape, strict=True)))


def path_name(path: Sequence) -> str:
    """A path of `jax.tree_util` as text: "vlm/norm/scale"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def tree_shardings(tree: Any, mesh: Mesh, memory: str | None = None) -> Any:
    """NamedShardings of parameters by PARAMETER_RULES, or of optimizer moments, whose paths end in the same way.

    memory: the memory kind that holds them; None: the device's own.
    """

    def leaf(path, x):
        return NamedSharding(mesh, _parameter_spec(path_name(path), x.shape, mesh.shape), memory_kind=memory)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def placed(tree: Any, layout: Any) -> Any:
    """The shapes and types of a tree with the shardings of `layout`, which is one sharding or a tree of them."""
    places = jax.tree.broadcast(layout, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """The shapes and types of a tree of parameters, with their shardings by PARAMETER_RULES."""
    return placed(tree, tree_shardings(tree, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_shards(mesh: Mesh) -> int:
    """Number of shards that rows are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of arrays whose first axis is rows; a KVCache's arrays (B, J, C, K) are cut by heads, too."""

    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, _row_spec(path, x, mesh.shape)), tree)


def constrain_rows(tree: Any) -> Any:
    """Pin such arrays to the layout of `row_shardings` on the mesh of `jax.set_mesh`; without a mesh, do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, _row_spec(path, x, mesh.shape)), tree
    )


def _row_spec(path: Sequence, x: Any, sizes: Mapping[str, int]) -> PartitionSpec:
    axes = (("data", "fsdp"), "tensor" if re.search(r"/(keys|values)/\d+$", path_name(path)) else None)
    return _fitting((*axes, *[None] * x.ndim)[: x.ndim], x.shape, sizes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
