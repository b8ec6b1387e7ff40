"""files.json: sizes and checksums of a saved step's files. Written when the step is complete, compared before it is
used.
"""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.text_files import read_json_file

NAME = "files.json"
READERS, PIECE = 8, 2**24  # number of files that are read at the same time; bytes of each that are in memory


def write(step: Path) -> None:
    """Write the list of the files of a step folder, with sizes and checksums (CRC-32). Raises OSError."""
    paths = [path for path in step.rglob("*") if path.is_file() and not path.name.startswith((NAME, f".{NAME}"))]
    found = zip(paths, _checksums(paths), strict=True)
    listed = {str(path.relative_to(step)): [path.stat().st_size, checksum] for path, checksum in found}
    write_whole(step / NAME, json.dumps(listed))


def has(step: Path) -> bool:
    """Whether a step folder has a list of its files."""
    return (step / NAME).is_file()


def fault(step: Path, unread: tuple[str, ...] = ()) -> str | None:
    """The first fault of a step folder: a file that is missing, cut off or changed. None if all files are as written.

    `unread`: subfolders that are not checked. Returns None for a step without a list, whose run was killed before it
    wrote one, because orbax gives a step folder its name only when it is complete.
    """
    if not has(step):
        return None
    try:
        listed = read_json_file(step / NAME).items()
        wanted = {
            step / name: (size, checksum) for name, (size, checksum) in listed if Path(name).parts[0] not in unread
        }
    except (ValueError, TypeError, AttributeError):  # UserError is a ValueError
        return f"{NAME} is damaged"
    for path, (size, _) in wanted.items():
        if not path.is_file():
            return f"{path.relative_to(step)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(step)} is cut off or changed"
    for (path, (_, checksum)), found in zip(wanted.items(), _checksums(list(wanted)), strict=True):
        if found != checksum:
            return f"{path.relative_to(step)} is changed"
    return None


def _checksums(paths: list[Path]) -> Iterator[int]:
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(_checksum, paths)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value
