"""Reading checkpoint files that may be missing, damaged or written by another program."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from starflow2_jax.errors import UserError
from starflow2_jax.text_files import read_json_file

T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or written by another program."""


def read_json(path: Path) -> object:
    """The JSON value of a file in a checkpoint directory. Raises CheckpointError."""
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path.parent}")
    if not path.exists():
        raise CheckpointError(f"{path.parent} is not a checkpoint of this program: it has no {path.name}")
    try:
        return read_json_file(path)
    except UserError as error:
        raise CheckpointError(f"{error}; restore it from a copy") from None


def restored(read: Callable[[], T], what: str, folder: Path) -> T:
    """The result of `read`. Raises CheckpointError, which names `what` and `folder`, if `read` fails for any reason."""
    try:
        return read()
    except Exception as error:  # orbax raises many types for damaged files, bare Exception included
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{what} in {folder} cannot be restored, because it is incomplete, damaged or of another model ({reason})"
        ) from None


def saved_shapes(checkpointer: ocp.StandardCheckpointer, folder: Path) -> Any:
    """The shapes and types of the arrays that orbax saved in `folder`. Call it within `restored`: many errors can
    occur.
    """
    if (metadata := checkpointer.metadata(folder).item_metadata) is None:
        raise ValueError(f"{folder.name} does not describe its arrays")
    return metadata.tree
