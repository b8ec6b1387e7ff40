"""The mesh, and which axis of which array lies on which axis of it. Sharding is data: ordered patterns, first match wins."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from starflow2_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Named constraints inside the models -> mesh axes.
LOGICAL = {
    "batch": ("data", "fsdp"),
    "sequence": None,
    "embed": None,
    "heads": "tensor",
    "hidden": "tensor",
}

# Parameter path -> axes, counted from the last dimension back (a leading layer axis stays whole).
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


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices` (all there are); one size may be -1: what is left. Raises UserError where the sizes do not fit."""
    devices = devices or jax.devices()
    sizes, count = [data, fsdp, tensor], len(devices)
    fixed = int(np.prod([s for s in sizes if s > 0]))
    if sizes.count(-1) > 1 or count % fixed or (-1 not in sizes and fixed != count):
        raise UserError(f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {count} devices")
    sizes = [count // fixed if s == -1 else s for s in sizes]
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin x's layout by logical axis names on the mesh in force (`jax.set_mesh`); nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = _fitting([LOGICAL.get(n) if n else None for n in names], x.shape, mesh.shape)
    return jax.lax.with_sharding_constraint(x, spec)


def _fitting(axes, shape, sizes) -> PartitionSpec:
    """Drop the axes whose size does not divide the dimension."""

    def size(axis):
        return int(np.prod([sizes[a] for a in ((axis,) if isinstance(axis, str) else axis)])) if axis else 1

    return PartitionSpec(*(a if dim % size(a) == 0 else None for a, dim in zip(axes, shape, strict=True)))


def path_name(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def tree_shardings(tree, mesh: jax.sharding.Mesh):
    """NamedShardings for a tree of parameters (or optimizer moments, whose paths end alike), by PARAMETER_RULES."""

    def leaf(path, x):
        name = path_name(path)
        rule = next(axes for pattern, axes in PARAMETER_RULES if re.search(pattern, name))
        rule = rule[-x.ndim :] if x.ndim else ()
        axes = (None,) * (x.ndim - len(rule)) + tuple(rule)
        return NamedSharding(mesh, _fitting(axes, x.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def spread(mesh: jax.sharding.Mesh) -> int:
    """Over how many places rows are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_shardings(tree, mesh: jax.sharding.Mesh):
    """NamedShardings of arrays that lead with rows, and of KVCache's keys and values (L, B, C, J, K)."""

    def leaf(path, x):
        rows = (("data", "fsdp"),)
        axes = (None, *rows, None, "tensor", None) if path_name(path).endswith(("/keys", "/values")) else rows
        axes += (None,) * (x.ndim - len(axes))
        return NamedSharding(mesh, _fitting(axes, x.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
