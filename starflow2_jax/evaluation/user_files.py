"""The files of a public benchmark, which the user brings, and the files that its scorer reads."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from starflow2_jax.errors import UserError, shown
from starflow2_jax.evaluation.protocol import Answer

LONGEST_NAME = 200  # bytes; file systems allow 255, of which scorers need some for endings such as _SRCIMG.png


@dataclass(frozen=True)
class Needed:
    """The file or folder that a benchmark needs, for messages."""

    benchmark: str
    what: str  # such as "evaluation_metadata.jsonl"
    where: str  # where one gets it

    def path(self, data: str | None) -> Path:
        """The path that the user gave. Raises UserError if none was given."""
        if data is None:
            raise UserError(f"the benchmark {self.benchmark} needs --prompts: {self.what}, from {self.where}")
        return Path(data)

    def file(self, data: str | None) -> Path:
        """The path that the user gave, if it is no folder. Raises UserError."""
        path = self.path(data)
        if path.is_dir():
            self.refuse(path, "is a folder")
        return path

    def refuse(self, place: object, fault: str) -> NoReturn:
        """Raises UserError: the user's file is not the one that is needed."""
        raise UserError(f"{place} {fault}; the benchmark {self.benchmark} needs {self.what}, from {self.where}")

    def require(self, place: object, row: object, names: Iterable[str]) -> Mapping[str, Any]:
        """The row, if it has these names. Raises UserError."""
        if not isinstance(row, Mapping):
            self.refuse(place, f"is {shown(row)} and no object")
        if missing := [name for name in names if row.get(name) is None]:
            self.refuse(place, f"has no {missing[0]!r}, but {shown(', '.join(map(str, row)))}")
        return row

    def whole(self, place: object, value: object) -> int:
        """A whole number. Raises UserError for another value."""
        try:
            return int(str(value))
        except ValueError:
            self.refuse(place, f"has {shown(value)} in place of a whole number")

    def file_name(self, place: object, value: object) -> str:
        """A value that a file or folder is named after. Raises UserError for one that cannot be a name."""
        name = str(value)
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > LONGEST_NAME:
            self.refuse(place, f"has {shown(value)} in place of a word that a file can be named after")
        return name


def facts(path: Path, rewritten: bool | None = None) -> dict[str, Any]:
    """What run.json says about a prompts file: its name, its hash, and, if it is known, whether the prompts are
    rewritten.
    """
    told = {"file": path.name, "sha256": sha256(path)}
    return told if rewritten is None else told | {"rewritten": rewritten}


def sha256(path: Path) -> str:
    """The hash of a file, or of the names and contents of all files of a folder."""
    total = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    for each in sorted(each for each in path.rglob("*") if each.is_file()):
        total.update(f"{each.relative_to(path).as_posix()}\0{sha256(each)}\n".encode())
    return total.hexdigest()


def picture_of(answer: Answer) -> Path:
    """The file of the one picture of an answer. Raises UserError if it has none."""
    if not answer.pictures:
        raise UserError(
            f"answer {answer.k} to task {answer.task.key} has no whole picture; leave out --max-tokens, or make it "
            f"larger"
        )
    return answer.pictures[0]


def place(source: Path, target: Path) -> None:
    """Give a file a second name, which needs no room; a copy where the disk has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
