"""The frozen weights of a checkpoint directory: frozen/ (orbax), and their content hash in frozen.json."""

import json
import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from starflow2_jax.checkpoints.content_hash import content_hash
from starflow2_jax.checkpoints.reading import CheckpointError, read_json, restored
from starflow2_jax.parallel import processes


class FrozenWeights:
    """Saves and restores them; `folder` is the checkpoint directory. All processes call the methods together."""

    def __init__(self, folder: Path):
        self.folder = folder

    def exists(self) -> bool:
        return processes.on_primary((self.folder / "frozen").is_dir)

    def save(self, frozen: dict) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / "frozen", frozen, force=True)
        content = json.dumps({"content_hash": content_hash(frozen)})
        processes.on_primary(lambda: (self.folder / "frozen.json").write_text(content, encoding="utf-8"))

    def restore(self, abstract: dict) -> dict:
        """The weights, with the shapes and shardings of `abstract` and the types that they were saved in.

        Raises CheckpointError if they are damaged, or if their content hash differs from the saved one.
        """
        wanted = read_json(self.folder / "frozen.json")
        wanted = wanted.get("content_hash") if isinstance(wanted, dict) else None
        if not isinstance(wanted, str):
            raise CheckpointError(f"{self.folder / 'frozen.json'} holds no content hash; restore it from a copy")
        with ocp.StandardCheckpointer(restore_concurrent_gb=_concurrent_gb(abstract)) as checkpointer:

            def read():
                saved = checkpointer.metadata(self.folder / "frozen").item_metadata.tree
                typed = jax.tree.map(lambda x, s: x.update(dtype=s.dtype), abstract, saved)
                return checkpointer.restore(self.folder / "frozen", typed)

            frozen = restored(read, "frozen weights", self.folder)
        if content_hash(frozen) != wanted:
            raise CheckpointError(
                f"the frozen weights in {self.folder} are not those it was trained on (content hash differs)"
            )
        return frozen


def _concurrent_gb(tree: dict) -> int:
    """GB that orbax may read at a time: room for the largest shard. Without a limit it buffers nearly a second model."""
    shards = (x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in jax.tree.leaves(tree))
    return 1 + int(2 * max((4 * math.prod(shape) for shape in shards), default=0) / 1e9)
