"""The frozen weights of a checkpoint directory: frozen/, saved by orbax, and their content hash in frozen.json."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from starflow2_jax.checkpoints.atomic_folder import require_room, write_whole
from starflow2_jax.checkpoints.reading import CheckpointError, read_json, restored, saved_shapes
from starflow2_jax.errors import storage_errors
from starflow2_jax.parallel import processes
from starflow2_jax.parallel.content_hash import content_hash


class FrozenWeights:
    """Saves and restores the frozen weights of the checkpoint directory `folder`. All processes call the methods
    together.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def exists(self) -> bool:
        """Whether frozen weights were saved."""
        return processes.on_primary((self.folder / "frozen").is_dir)

    def save(self, frozen: dict[str, Any]) -> None:
        """Save the weights and their content hash. Raises StorageError."""
        processes.on_primary(partial(require_room, self.folder, sum(x.nbytes for x in jax.tree.leaves(frozen))))
        with storage_errors(self.folder), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / "frozen", frozen, force=True)
        content = json.dumps({"content_hash": content_hash(frozen)})
        with storage_errors(self.folder):
            processes.on_primary(partial(write_whole, self.folder / "frozen.json", content))

    def restore(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """The weights, with the shapes and shardings of `abstract` and the types that they were saved with.

        Raises CheckpointError if they are damaged, or if their content hash differs from the saved one.
        """
        wanted = read_json(self.folder / "frozen.json")
        wanted = wanted.get("content_hash") if isinstance(wanted, dict) else None
        if not isinstance(wanted, str):
            raise CheckpointError(f"{self.folder / 'frozen.json'} holds no content hash; restore it from a copy")
        with ocp.StandardCheckpointer(restore_concurrent_gb=_concurrent_gb(abstract)) as checkpointer:

            def read():
                saved = saved_shapes(checkpointer, self.folder / "frozen")
                typed = jax.tree.map(lambda x, s: x.update(dtype=s.dtype), abstract, saved)
                return checkpointer.restore(self.folder / "frozen", typed)

            frozen = restored(read, "frozen weights", self.folder)
        if content_hash(frozen) != wanted:
            raise CheckpointError(
                f"the frozen weights in {self.folder} are not those that it was trained with (content hash differs); "
                f"restore frozen/ and frozen.json from a copy"
            )
        return frozen


def _concurrent_gb(tree: Any) -> int:
    """GB that orbax may read at a time, enough for the largest shard. Without a limit, orbax buffers almost a whole
    model.
    """
    shards = (x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in jax.tree.leaves(tree))
    return 1 + int(2 * max((4 * math.prod(shape) for shape in shards), default=0) / 1e9)
