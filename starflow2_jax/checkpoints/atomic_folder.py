"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from starflow2_jax.errors import OUT_OF_ROOM, StorageError, UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file (UTF-8). Raises OSError, for example on a full disk; then the old file stays as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def require_new(target: Path) -> None:
    """Raises UserError if `target` exists."""
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder or remove it")


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder, which is renamed to `target` at the end of the block, or removed if the block fails.

    First removes temporary folders of `target` that processes of this machine left when they were killed. Raises
    UserError if `target` exists, and StorageError if the disk has less than `size` bytes of free space.
    """
    require_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_behind(target):
        shutil.rmtree(left, ignore_errors=True)
    require_room(target.parent, size)
    partial = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        require_new(target)  # another process may have made it in the meantime
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _left_behind(target: Path) -> Iterator[Path]:
    """Temporary folders of `target` whose processes ran on this machine and have ended."""
    prefix = f".{target.name}.{socket.gethostname()}."
    for folder in target.parent.iterdir():
        pid = folder.name.removeprefix(prefix).removesuffix(".partial")
        if folder.name == f"{prefix}{pid}.partial" and pid.isdecimal() and not _alive(int(pid)):
            yield folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@contextlib.contextmanager
def moved_folder(target: Path) -> Iterator[Path]:
    """A temporary folder, whose entries are moved into the folder `target` at the end of the block.

    A folder that is there already stays as it is, and a file is replaced. If the block fails, nothing is moved.
    """
    partial = Path(tempfile.mkdtemp(prefix=".partial.", dir=target))  # another process may do the same
    try:
        yield partial
        for entry in sorted(partial.iterdir()):
            if not (entry.is_dir() and (target / entry.name).exists()):
                entry.replace(target / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_room(folder: Path, size: int, standing: str = "") -> None:
    """Raises StorageError if the disk of `folder` has less than `size` bytes of free space.

    `standing`: part of the message about what is saved already.
    """
    total, _, free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists()))
    if total and free < size:  # some mounted buckets report 0 of 0
        left = f" ({standing})" if standing else ""
        raise StorageError(
            f"{folder} has {free / 1e9:.3g} GB of free space, and {size / 1e9:.3g} GB are needed{left}; {OUT_OF_ROOM}"
        )
