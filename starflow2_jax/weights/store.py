"""The arrays of an orbax checkpoint, written and read in slices, so that no array has to fit in memory.

Without its option OCDBT, orbax saves each array in a zarr folder of its own, beside a description of the tree. Here
orbax saves a tree of single numbers, which makes the description; TensorStore then replaces these by arrays of the real
shapes.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from flax import traverse_util

from starflow2_jax.parallel.content_hash import combine, sums
from starflow2_jax.weights.table import WeightError

CHUNK = 2**24  # bytes that are read, hashed and written at a time, at most


class ArrayStore:
    """Writes or reads the arrays of a checkpoint by path, such as "vlm/norm/scale".

    `content_hash` is valid when every array has been written, or read, exactly once.
    """

    def __init__(self, folder: Path, tree: dict, create: bool):
        """Make the checkpoint `folder` if `create`, else open it. `tree`: shapes and types of all arrays.

        Raises ValueError if an existing checkpoint has other shapes.
        """
        leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
        if create:
            _describe(folder, tree)
        self._arrays = {path: _open(folder, path, x, create) for path, x in leaves.items()}
        self._sums = {path: np.zeros(2, np.uint32) for path in leaves}

    def write(self, path: str, layer: int | None, value: np.ndarray) -> None:
        """Write an array chunk by chunk; only the slice `layer` of its first axis if that is not None."""
        array = self._arrays[path] if layer is None else self._arrays[path][layer]
        for index in _blocks(value.shape, _chunk(value.shape, value.dtype.itemsize)):
            piece = np.array(value[index], order="C")  # a copy: JAX may keep it for a while, and `value` is large
            done = array[index].write(piece)
            self._count(path, layer, index, piece)
            done.result()

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Read an array; only the slice `layer` of its first axis if that is not None. Raises WeightError if its files
        are damaged.
        """
        array = self._arrays[path] if layer is None else self._arrays[path][layer]
        value = np.empty(array.shape, array.dtype.numpy_dtype)
        for index in _blocks(value.shape, _chunk(value.shape, value.dtype.itemsize)):
            try:
                piece = array[index].read().result()
            except ValueError as error:
                raise WeightError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
            value[index] = piece
            self._count(path, layer, index, piece)
        return value

    def dtype(self, path: str) -> np.dtype:
        """The type of an array in the checkpoint."""
        return self._arrays[path].dtype.numpy_dtype

    def content_hash(self) -> str:
        """The content hash of the arrays that were written or read."""
        arrays = self._arrays.items()
        return combine((path, a.dtype.numpy_dtype, a.shape, self._sums[path]) for path, a in arrays)

    def _count(self, path: str, layer: int | None, index: tuple[slice, ...], piece: np.ndarray) -> None:
        """Add a piece to the sums of its array, for the content hash."""
        start = tuple(i.start for i in index)
        if layer is not None:
            start, piece = (layer, *start), piece[None]
        self._sums[path] += np.asarray(sums(piece, start))


def _describe(folder: Path, tree: dict) -> None:
    """Save a checkpoint of the tree, with a single number in place of each array."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns that a checkpoint without OCDBT has no OCDBT files to merge
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(folder, jax.tree.map(lambda x: np.zeros((), x.dtype), tree))
    finally:
        logging.set_verbosity(verbosity)


def _open(folder: Path, path: str, x: jax.ShapeDtypeStruct, create: bool) -> ts.TensorStore:
    """The zarr array of a parameter; `create`: replaces what is there by an empty one. Raises ValueError for another
    shape.
    """
    name = path.replace("/", ".")  # as orbax names it
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
    if not create:
        return ts.open(spec, open=True, read=True, shape=x.shape).result()
    layered = "/layers/" in path
    chunks = _chunk(x.shape[layered:], x.dtype.itemsize)
    spec |= {
        "metadata": {"compressor": None, "chunks": [1, *chunks] if layered else list(chunks)},
        "store_data_equal_to_fill_value": True,  # orbax reports a missing chunk as a damaged checkpoint
    }
    return ts.open(spec, dtype=x.dtype, shape=x.shape, create=True, delete_existing=True).result()


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a chunk of at most CHUNK bytes: the array's shape, of which the longest side is halved
    repeatedly.
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > CHUNK:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


def _blocks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The index of every chunk of an array, as slices."""
    ranges = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(starts, chunk, shape, strict=True))
