"""Meshes over several slices, which no test machine has: devices that only say where they are."""

from dataclasses import dataclass

import numpy as np
import pytest

from starflow2_jax import sharding
from starflow2_jax.errors import UserError


@dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def slices(**mesh) -> np.ndarray:
    """In which of two slices of four devices each place of the mesh is."""
    devices = [Device(i, i // 4) for i in range(8)]
    placed = sharding.hybrid_devices(tuple(mesh.get(axis, 1) for axis in sharding.AXES), devices)
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
