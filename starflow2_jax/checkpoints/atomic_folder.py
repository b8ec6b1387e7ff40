"""Folders that are whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from starflow2_jax.errors import UserError


def require_new(target: Path) -> None:
    """Raises UserError where `target` exists."""
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder or remove it")


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder for `size` bytes that becomes `target` when all went well, and vanishes otherwise.

    Raises UserError where `target` exists or the disk is too full.
    """
    require_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise UserError(f"{target.parent} has {free / 1e9:.1f} GB of free space; {size / 1e9:.1f} GB are needed")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
