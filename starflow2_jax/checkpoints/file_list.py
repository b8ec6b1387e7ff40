"""Which files a saved step has: written when it is whole, compared before it is used."""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "files.json"
READERS, PIECE = 8, 2**24  # files read at a time; bytes of one that are in memory


def write(step: Path) -> None:
    """List the files of a step folder, with sizes and checksums."""
    paths = [path for path in step.rglob("*") if path.is_file() and path.name not in (NAME, f".{NAME}")]
    found = zip(paths, _checksums(paths), strict=True)
    partial = step / f".{NAME}"
    partial.write_text(
        json.dumps({str(p.relative_to(step)): [p.stat().st_size, sum_] for p, sum_ in found}), encoding="utf-8"
    )
    partial.rename(step / NAME)


def has(step: Path) -> bool:
    return (step / NAME).is_file()


def fault(step: Path, unread: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a step folder: a file that is missing, cut off or changed; None where all is as it was written.

    `unread`: subfolders that are not looked at. A step without a list (killed before it was written) is whole as far as can be seen here: a step folder gets its name only when all of it is there.
    """
    if not has(step):
        return None
    try:
        listed = json.loads((step / NAME).read_text(encoding="utf-8")).items()
        wanted = {step / name: (size, sum_) for name, (size, sum_) in listed if Path(name).parts[0] not in unread}
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{NAME} is damaged"
    for path, (size, _) in wanted.items():
        if not path.is_file():
            return f"{path.relative_to(step)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(step)} is cut off or changed"
    for (path, (_, sum_)), found in zip(wanted.items(), _checksums(list(wanted)), strict=True):
        if found != sum_:
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
