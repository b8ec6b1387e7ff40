"""Meshes of TPUs and over several slices, from made-up devices that only have coordinates."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from starflow2_jax.config.schema import MeshConfig
from starflow2_jax.errors import UserError
from starflow2_jax.parallel import sharding


@dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def slices(**mesh) -> np.ndarray:
    """For each place of the mesh, the slice that its device is in: two slices of four devices."""
    devices = [Device(i, i // 4) for i in range(8)]
    placed = sharding.placed_devices(tuple(mesh.get(axis, 1) for axis in sharding.AXES), devices)
    assert sorted(d.id for d in placed.flat) == list(range(8))
    return np.vectorize(lambda device: device.slice_index)(placed)


def test_data_goes_between_slices():
    where = slices(data=2, fsdp=2, tensor=2)
    assert (where[0] == 0).all() and (where[1] == 1).all()
    assert all(len(set(where[i].flat)) == 1 for i in range(2))


def test_fsdp_goes_between_slices_where_data_does_not():
    where = slices(fsdp=4, sequence=2)
    assert len(set(where.flat)) == 2
    assert all(len(set(where[0, i].flat)) == 1 for i in range(4))


def test_tensor_never_does():
    with pytest.raises(UserError, match="the devices are of 2 slices: data=1"):
        slices(tensor=8)


@dataclass(frozen=True)
class Torus(Device):
    coords: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "torus, slices, tensor, mesh",
    [
        ((4, 4), 1, 1, (1, 16)),
        ((16, 16), 1, 1, (4, 64)),  # 256 would leave 12 of 3072 channels
        ((4, 4, 4), 1, 1, (4, 16)),  # a plane
        ((4, 8, 8), 1, 1, (4, 64)),
        ((4, 4, 4), 1, 2, (2, 16)),
        ((4, 4), 2, 1, (2, 16)),  # within a slice
    ],
)
def test_data_and_fsdp_share_the_devices_of_a_torus(torus, slices, tensor, mesh):
    places = [*np.ndindex(torus)] * slices
    devices = [Torus(i, i // np.prod(torus), "tpu", "TPU v5", 0, place) for i, place in enumerate(places)]
    assert (len(devices) // mesh[1] // tensor, sharding.fsdp_of(devices, len(devices) // tensor)) == mesh


def test_data_and_fsdp_share_the_devices_without_a_torus():
    assert sharding.make_mesh(-1, -1).shape == dict(data=1, fsdp=8, sequence=1, tensor=1)
    assert sharding.make_mesh(-1, -1, tensor=2).shape == dict(data=1, fsdp=4, sequence=1, tensor=2)
    assert sharding.fsdp_of([Device(i, 0) for i in range(512)], 512) == 64
    with pytest.raises(UserError, match="data=-1 fsdp=-1 sequence=1 tensor=3 does not fit 8 devices"):
        sharding.make_mesh(-1, -1, tensor=3)


def test_of_the_axes_only_data_and_fsdp_share_devices():
    assert MeshConfig(data=-1, fsdp=-1).fsdp == -1
    for axes in (dict(data=-1, tensor=-1), dict(data=1, fsdp=-1, sequence=-1), dict(data=-1, fsdp=-1, tensor=-1)):
        with pytest.raises(UserError, match="only one axis can be -1"):
            MeshConfig(**axes)


def shapes(**sizes: tuple[int, ...]) -> dict:
    return {"block": {name: {"kernel": jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in sizes.items()}}


@pytest.mark.parametrize(
    "shape, fsdp, spec",
    [
        ((64, 48), 16, ("fsdp", None)),
        ((24, 64), 16, (None, "fsdp")),  # 16 does not divide 24
        ((24, 40), 16, (None, None)),
        ((16, 24, 40), 16, (None, None, None)),  # never over the layers of a stack
        ((16, 24, 64), 16, (None, None, "fsdp")),
    ],
)
def test_a_parameter_is_cut_over_another_dimension_if_need_be(shape, fsdp, spec):
    mesh = jax.sharding.AbstractMesh((1, fsdp, 1, 1), sharding.AXES)
    [place] = jax.tree.leaves(sharding.tree_shardings(shapes(out=shape), mesh))
    assert tuple(place.spec) == spec


def test_parameters_that_every_device_holds_whole_are_named():
    """7168 is 7 x 1024, and 3584 is 7 x 512."""
    tree = shapes(first=(3584, 3584), second=(3584, 7168), third=(3584, 1792))
    sizes = dict(data=2, fsdp=1024, sequence=1, tensor=1)
    said = sharding.held_whole(tree, sizes)
    assert f"{(3584 + 1792) * 3584 * 4 / 2**30:.2f} GiB" in said
    assert "fsdp=1024 divides no dimension of block/first/kernel, block/third/kernel; " in said
    assert said.endswith("mesh.data=4 with mesh.fsdp=512 cuts them")
    assert sharding.held_whole(tree, sizes | dict(fsdp=512)) == ""
    assert sharding.held_whole(shapes(small=(31, 31)), sizes) == ""  # too small to matter
    assert "cuts them" not in sharding.held_whole(shapes(odd=(3583, 3583)), sizes)


DESCRIBED = """
import json
import jax
from jax.experimental import topologies
from starflow2_jax.parallel import sharding
from starflow2_jax.config.schema import MeshConfig
from starflow2_jax.errors import UserError
from starflow2_jax.planning import compiling
from starflow2_jax.parallel import hardware


def groups(devices, **sizes):
    mesh = sharding.make_mesh(data=-1, devices=devices, **sizes)
    assert mesh.axis_names == sharding.AXES and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    return [[(d.slice_index if hasattr(d, "slice_index") else 0, *d.coords) for d in group]
            for group in mesh.devices.reshape(-1, mesh.shape["sequence"] * mesh.shape["tensor"])]


v5e, v6e, v5p, v4 = (compiling.described_devices(hardware.parse_topology(t)) for t in ("v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v4:2x2x4"))
two = list(topologies.get_topology_desc("v6e:4x4", platform="tpu", num_slices=2).devices)
print(json.dumps({
    "v6e": [groups(v6e, fsdp=64, tensor=4), groups(v6e, fsdp=64, sequence=2, tensor=2)],
    "v5p": [groups(v5p, fsdp=32, tensor=2), groups(v5p, fsdp=8, tensor=8)],
    "two slices": [groups(two, fsdp=8, tensor=2)],
    "v4": [groups(v4, fsdp=8, tensor=2)],
}))
for devices in v5e, v6e, v5p:
    usual = jax.make_mesh((1, len(devices), 1, 1), sharding.AXES, devices=devices)
    assert (sharding.make_mesh(data=1, fsdp=-1, devices=devices).devices == usual.devices).all()
try:
    sharding.make_mesh(devices=list(topologies.get_topology_desc("v4:2x2x1", platform="tpu").devices))
except UserError as error:
    print(error)
"""


@pytest.mark.tpu
def test_axes_share_the_dimensions_of_a_torus():
    """No axis of these is made of whole dimensions: yet what lies together in `sequence` and `tensor` is a box of
    neighbours.

    Meshes of fsdp alone are JAX's own. Where a v4's chip is two devices, JAX makes no mesh of them.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBED],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, made, refused = done.stdout.splitlines()
    for meshes, chips in zip(json.loads(made).values(), (256, 64, 32, 16), strict=True):
        for mesh in meshes:
            assert len({tuple(place) for group in mesh for place in group}) == chips
            for group in np.array(mesh):
                assert np.prod(np.ptp(group, axis=0) + 1) == len(group)
    assert refused.startswith("the devices cannot be laid out as a mesh data=8 fsdp=1 sequence=1 tensor=1 (")
