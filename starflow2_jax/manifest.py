"""Which files a saved step has: written when it is whole, compared before it is used."""

import json
import zlib
from pathlib import Path

NAME = "files.json"
SMALL = 2**20  # bytes; files up to this size (all metadata, and indices) are compared by content, too


def write(step: Path) -> None:
    """List the files of a step folder, with sizes and checksums of the small ones."""
    partial = step / f".{NAME}"
    partial.write_text(json.dumps({str(path.relative_to(step)): _describe(path) for path in _files(step)}))
    partial.rename(step / NAME)


def has(step: Path) -> bool:
    return (step / NAME).is_file()


def fault(step: Path) -> str | None:
    """What is wrong with a step folder: a file that is missing, cut off or changed; None where all is as it was written.

    A step without a list (of an older version, or killed before it was written) is whole as far as can be seen here:
    a step folder gets its name only when all of it is there.
    """
    if not has(step):
        return None
    try:
        wanted = json.loads((step / NAME).read_text())
        files = wanted.items()
    except (OSError, ValueError, AttributeError):
        return f"{NAME} is damaged"
    for name, description in files:
        path = step / name
        if not path.is_file():
            return f"{name} is missing"
        if _describe(path) != description:
            return f"{name} is cut off or changed"
    return None


def _files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and path.name not in (NAME, f".{NAME}"))


def _describe(path: Path) -> list[int]:
    """Size, and the checksum of a small file."""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes())] if size <= SMALL else [size]
