"""The untrained flows with which a run on a converted VLM begins: how large they are, whether they fit, and making
them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import devices, sharding
from starflow2_jax.training import program


@dataclass(frozen=True)
class Group:
    """A group of parameters, such as the deep flow."""

    name: str
    parameters: int
    size: int  # bytes
    of_device: int  # bytes on each device


def groups(model: Pretzel, mesh: jax.sharding.Mesh) -> list[Group]:
    """The trainable groups of a model. Uses no memory and no devices."""
    shapes = sharding.abstract(program.abstract_params(model, "trainable"), mesh)

    def total(tree: Any, count: Callable[[Any], int]) -> int:
        return sum(count(x) for x in jax.tree.leaves(tree))

    return [
        Group(
            name,
            total(tree, lambda x: x.size),
            total(tree, lambda x: x.size * x.dtype.itemsize),
            total(tree, lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize),
        )
        for name, tree in shapes.items()
    ]


def require_memory(
    groups: Sequence[Group], mesh: jax.sharding.Mesh, folder: Path, say: Callable[[str], None], force: bool
) -> None:
    """Say how much disk and memory the groups need. Raises UserError if they exceed the memory, unless `force`."""
    local = mesh.local_devices
    on_cpu = local[0].platform == "cpu"
    need = sum(group.of_device for group in groups) * (len(local) if on_cpu else 1)  # CPU devices share one memory
    free = min(devices.free_memory(device) for device in local)
    place = "this machine's memory" if on_cpu else f"the memory of each {local[0].device_kind}"
    parameters, size = (sum(getattr(group, of) for group in groups) for of in ("parameters", "size"))
    say(
        f"{parameters:,} parameters of the untrained flows: {size / 1e9:.3g} GB on disk in {folder}, made in "
        f"{need / 1e9:.3g} GB of {place}"
    )
    if need > free and not force:
        raise UserError(
            f"the untrained flows take {need / 1e9:.3g} GB of {place}, and {free / 1e9:.3g} GB are free; split them "
            f"over devices with mesh.fsdp, use a machine with more memory, or begin anyway with --force"
        )


def make(
    model: Pretzel, seed: int, groups: Sequence[Group], mesh: jax.sharding.Mesh, say: Callable[[str], None]
) -> dict:
    """Fresh parameters of the groups, one group after another."""
    params = {}
    for number, group in enumerate(groups, 1):
        say(f"making {group.name} ({number} of {len(groups)}): {group.size / 1e9:.3g} GB")
        params[group.name] = jax.block_until_ready(program.fresh_group(model, seed, group.name, mesh))
    return params
