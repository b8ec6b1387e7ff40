"""Finds damaged steps before a run resumes or a model is sampled from, and warns. A run also moves them to damaged/."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from starflow2_jax.checkpoints import file_list
from starflow2_jax.checkpoints.reading import CheckpointError, restored, saved_shapes
from starflow2_jax.checkpoints.steps import Steps
from starflow2_jax.errors import UserError
from starflow2_jax.parallel import processes, sharding
from starflow2_jax.text_files import read_json_file

NO_ARRAYS = ("meta", "metrics")  # folders of a step that hold JSON; all others hold trees of arrays


def newest_whole(steps: Steps, unread: tuple[str, ...] = ()) -> tuple[int | None, list[int]]:
    """The newest whole step (None if there are no steps), and the damaged steps after it, of which this warns on
    stderr.

    `unread`: names of trees whose files are not checked. Raises CheckpointError if all steps are damaged.
    """
    damaged = []
    for number in reversed(steps.on_disk()):
        if (fault := _fault(steps.path(number), unread)) is None:
            return number, damaged
        damaged.append(number)
        print(
            f"WARNING: step {number} in {steps.folder} is damaged ({fault}); trying the step before",
            file=sys.stderr,
        )
    if damaged:
        raise CheckpointError(
            f"every saved step in {steps.folder} is damaged ({', '.join(map(str, damaged))}); restore one from a copy"
        )
    return None, []


def pass_over_damaged(steps: Steps) -> None:
    """Move the damaged steps after the newest whole one to damaged/. A run calls it before it resumes.

    All processes call it together. Raises CheckpointError if all steps are damaged.
    """
    processes.on_primary(lambda: [_put_away(steps, number) for number in newest_whole(steps)[1]])
    steps.reload()


def pass_over_unreadable(steps: Steps, mesh: jax.sharding.Mesh) -> None:
    """Make sure that the newest step can be read. A run calls it after `pass_over_damaged`.

    If the newest step has no files.json because the run was killed first, this function tries to read the step. If that
    fails, it moves the step to damaged/ and tries the step before. All processes call it together, and each reads its
    own shards. Raises CheckpointError if no other step is left.
    """
    while (number := steps.latest()) is not None:
        if processes.on_primary(partial(file_list.has, steps.path(number))):
            return
        faults = [fault for fault in processes.gather(_unreadable(steps, number, mesh)) if fault]
        if not faults:
            return
        if len(steps.manager.all_steps()) == 1:
            raise CheckpointError(f"{faults[0]}, and there is no other step; restore it from a copy")
        print(f"WARNING: {faults[0]}; trying the step before", file=sys.stderr)
        processes.on_primary(partial(_put_away, steps, number))
        steps.reload()


def _fault(step: Path, unread: tuple[str, ...]) -> str | None:
    """What is wrong with the files of a step; None if nothing is."""
    if fault := file_list.fault(step, unread):
        return fault
    path = step / "meta" / "metadata"  # read even if there is no list of files
    try:
        read_json_file(path)
    except UserError as error:
        return f"{path.name} of meta cannot be read: {error}"
    return None


def _unreadable(steps: Steps, number: int, mesh: jax.sharding.Mesh) -> str | None:
    """The message of the first error in reading all trees of a step; None if they can be read."""
    names = processes.on_primary(lambda: _trees(steps.path(number)))
    with ocp.StandardCheckpointer() as checkpointer:
        for name in names:
            read = partial(_read_tree, checkpointer, steps.path(number) / name, mesh)
            try:
                restored(read, f"step {number}", steps.folder)
            except CheckpointError as error:
                return str(error)
    return None


def _trees(step: Path) -> list[str]:
    """The names of the trees of arrays in a step's folder."""
    return sorted(item.name for item in step.iterdir() if item.is_dir() and item.name not in NO_ARRAYS)


def _read_tree(checkpointer: ocp.StandardCheckpointer, item: Path, mesh: jax.sharding.Mesh) -> Any:
    """The tree of arrays in the folder `item`, with the shapes and types that it was saved with, on the mesh."""
    return checkpointer.restore(item, sharding.abstract(saved_shapes(checkpointer, item), mesh))


def _put_away(steps: Steps, number: int) -> None:
    """Move a step to damaged/."""
    places = (steps.folder / "damaged" / f"{number}.{i}" for i in range(10**6))
    place = next(place for place in places if not place.exists())
    place.parent.mkdir(exist_ok=True)
    steps.path(number).rename(place)
