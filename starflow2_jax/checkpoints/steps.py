"""The saved steps of a run, steps/<n>/: saved by orbax beside the training, restored onto any mesh."""

import threading
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from starflow2_jax.checkpoints import file_list
from starflow2_jax.checkpoints.reading import CheckpointError, restored
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.parallel import processes


class Steps:
    """Saves and restores steps; `folder` is the checkpoint directory.

    A step holds named trees of arrays ("params", "ema", ...) and `meta`, a JSON value. All processes of a run call the
    methods together.
    """

    def __init__(self, folder: Path, keep: Keep):
        self.folder, self.keep = folder, keep
        self._manager: ocp.CheckpointManager | None = None
        self._lister: threading.Thread | None = None
        self._written = threading.Event()  # set once orbax has written the last step

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager; the first use creates the folder."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self.keep.policy(),
                single_host_load_and_broadcast=True,  # process 0 says which steps there are
            )
            self._manager = ocp.CheckpointManager(self.folder / "steps", options=options)
        return self._manager

    def open(self) -> None:
        """Create the folder if there is none. From here on the processes need not agree on whether there is one."""
        self.manager  # noqa: B018 - it is made here

    def path(self, number: int) -> Path:
        return self.folder / "steps" / str(number)

    def on_disk(self) -> list[int]:
        """The whole steps that this process sees, in ascending order. A step gets its name when all of it is written."""
        folder = self.folder / "steps"
        return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit()) if folder.is_dir() else []

    def latest(self) -> int | None:
        """The newest step that process 0 saw when the manager was made, or that was saved since; None without one."""
        if self._manager is None and not processes.on_primary((self.folder / "steps").is_dir):
            return None
        return self.manager.latest_step()

    def save(self, number: int, trees: dict[str, dict], meta: dict, metrics: dict[str, float] | None = None) -> None:
        """Save `trees` by name and `meta` as step `number`; `metrics`, "stage" (its place in the order) and "loss",
        are for Keep.best.

        Returns before the files are written; `wait` for them. Raises CheckpointError if the directory holds this step or
        a later one.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        composite = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        self.wait()  # for the step before; orbax would wait for it now, too
        if not self.manager.save(number, args=composite, metrics=metrics):
            raise CheckpointError(
                f"step {number} cannot be saved in {self.folder}, which holds step {self.manager.latest_step()} already; move "
                "that and all from this number on away, or save to another directory"
            )
        if processes.primary():
            self._written = threading.Event()
            self._lister = threading.Thread(target=self._list_files, args=(number, self._written), daemon=True)
            self._lister.start()

    def wait(self) -> None:
        """Wait until the last saved step and its list of files are written."""
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        finally:
            if self._lister is not None:
                self._written.set()
                self._lister.join()
                self._lister = None

    def close(self) -> None:
        """Wait for the files, and let go of the directory."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def reload(self) -> None:
        """Read again which steps there are, after some were moved away."""
        if self._manager is not None:
            self._manager.reload()

    def _list_files(self, number: int, written: threading.Event) -> None:
        """Beside the training: once step `number` is whole, list its files, and those of older steps without a list."""
        while not (self.path(number).is_dir() or written.wait(1)):
            pass
        for step in self.manager.all_steps():  # orbax drops a step from these before it deletes its files
            if self.path(step).is_dir() and not file_list.has(self.path(step)):
                file_list.write(self.path(step))

    def meta(self, number: int) -> dict:
        """What `save` was given as `meta`. Raises CheckpointError."""

        def read():
            return self.manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))

        return restored(read, f"step {number}", self.folder)["meta"]

    def has(self, number: int, name: str) -> bool:
        """Whether a step holds the tree `name`; empty trees are not saved."""
        return processes.on_primary((self.path(number) / name).is_dir)

    def restore(self, number: int, abstract: dict[str, dict]) -> dict[str, dict]:
        """The named trees, with the shapes, types and shardings of `abstract`. Raises CheckpointError."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items() if jax.tree.leaves(tree)}

        def read():
            return self.manager.restore(number, args=ocp.args.Composite(**items))

        found = restored(read, f"step {number}", self.folder)
        return {name: found[name] if name in items else tree for name, tree in abstract.items()}
