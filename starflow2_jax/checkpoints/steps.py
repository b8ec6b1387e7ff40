"""The saved steps of a run, steps/<n>/. Orbax saves them in the background, and restores them onto any mesh."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from starflow2_jax.checkpoints import file_list
from starflow2_jax.checkpoints.atomic_folder import require_room
from starflow2_jax.checkpoints.reading import CheckpointError, restored
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.errors import refused_write, storage_errors
from starflow2_jax.parallel import processes


class Steps:
    """Saves and restores the steps of the checkpoint directory `folder`.

    A step holds named trees of arrays ("params", "ema", ...) and `meta`, a JSON value. All processes of a run call the
    methods together.
    """

    def __init__(self, folder: Path, keep: Keep):
        self.folder, self.keep = folder, keep
        self._manager: ocp.CheckpointManager | None = None
        self._lister: threading.Thread | None = None
        self._written = threading.Event()  # set when orbax has written the last step, or has failed to

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's checkpoint manager. The first use makes it, and creates the folder."""
        if self._manager is None:
            report_once()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self.keep.policy(),
                single_host_load_and_broadcast=True,  # all processes see the steps that process 0 sees
            )
            self._manager = ocp.CheckpointManager(self.folder / "steps", options=options)
        return self._manager

    def open(self) -> None:
        """Create the folder if it does not exist. All processes call it, so that each finds the folder later. Raises
        StorageError.
        """
        with storage_errors(self.folder):
            self.manager  # noqa: B018 - the property creates it

    def path(self, number: int) -> Path:
        """The folder of a step."""
        return self.folder / "steps" / str(number)

    def on_disk(self) -> list[int]:
        """The complete steps that this process sees, in ascending order. Orbax renames a folder to the step when it is
        complete.
        """
        folder = self.folder / "steps"
        return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit()) if folder.is_dir() else []

    def latest(self) -> int | None:
        """The newest step that process 0 saw when the manager was made, or that was saved since; None if there is
        none.
        """
        if self._manager is None and not processes.on_primary((self.folder / "steps").is_dir):
            return None
        return self.manager.latest_step()

    def save(
        self, number: int, trees: dict[str, Any], meta: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Save named trees of arrays and a JSON value as step `number`. Returns before the files are written; see
        `wait`.

        `metrics` are for Keep.best: "stage", its place in the order, and "loss". Raises CheckpointError if the
        directory holds this step or a later one, and StorageError if the disk has no room for it, or if the last step
        could not be written.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        composite = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        self.wait()  # for the last step; orbax would wait for it, too
        size = sum(x.nbytes for x in jax.tree.leaves(list(trees.values())))
        processes.on_primary(lambda: require_room(self.folder, size, self._standing()))
        with self._storage_errors():
            saved = self.manager.save(number, args=composite, metrics=metrics)
        if not saved:
            raise CheckpointError(
                f"step {number} cannot be saved in {self.folder}, which holds step {self.manager.latest_step()} "
                f"already; move that step and all later ones away, or save to another directory"
            )
        if processes.primary():
            self._written = threading.Event()
            self._lister = threading.Thread(target=self._list_files, args=(number, self._written), daemon=True)
            self._lister.start()

    def wait(self) -> None:
        """Wait until the last saved step and its list of files are written. Raises StorageError if that failed."""
        try:
            if self._manager is not None:
                with self._storage_errors():
                    self._manager.wait_until_finished()
        finally:
            if self._lister is not None:
                self._written.set()
                self._lister.join()
                self._lister = None

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Raises StorageError, which names the last good step, if a write is refused."""
        with storage_errors(self.folder, self._standing):
            yield

    def _standing(self) -> str:
        whole = self.on_disk()
        return f"the last good checkpoint is step {whole[-1]}" if whole else "there is no checkpoint yet"

    def close(self) -> None:
        """Wait for the files, and close the directory."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def reload(self) -> None:
        """Read again which steps exist, after some were moved away."""
        if self._manager is not None:
            self._manager.reload()

    def _list_files(self, number: int, written: threading.Event) -> None:
        """Write the lists of files of step `number`, when it is complete, and of older steps without one. Runs in a
        thread.
        """
        while not (self.path(number).is_dir() or written.wait(1)):
            pass
        for step in self.manager.all_steps():  # without steps that orbax is deleting
            try:
                if self.path(step).is_dir() and not file_list.has(self.path(step)):
                    file_list.write(self.path(step))
            except OSError as error:
                reason = f"{self.path(step) / file_list.NAME} cannot be written ({error.strerror})"
                print(f"WARNING: {reason}; the run tries again when it saves the next step", file=sys.stderr)

    def meta(self, number: int) -> dict[str, Any]:
        """The `meta` that `save` was given. Raises CheckpointError."""

        def read():
            return self.manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))

        return restored(read, f"step {number}", self.folder)["meta"]

    def has(self, number: int, name: str) -> bool:
        """Whether a step holds the tree `name`; empty trees are not saved."""
        return processes.on_primary((self.path(number) / name).is_dir)

    def restore(self, number: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The named trees, with the shapes, types and shardings of `abstract`. Raises CheckpointError."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items() if jax.tree.leaves(tree)}

        def read():
            return self.manager.restore(number, args=ocp.args.Composite(**items))

        found = restored(read, f"step {number}", self.folder)
        return {name: found[name] if name in items else tree for name, tree in abstract.items()}


@cache
def report_once() -> None:
    """Silence the reports of orbax's threads about refused writes, because `Steps.wait` raises those errors. This lasts
    until the process ends, because some of the reports come then."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_report)
    before = sys.unraisablehook  # the command line's sends a signal again that came in a destructor

    def without_closed_loops(found: "sys.UnraisableHookArgs") -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = without_closed_loops


def _is_no_report(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or refused_write(error) is None
