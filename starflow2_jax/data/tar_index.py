"""A reader of TSV files that say which file of which tar is the picture of each caption, as ml-starflow has them."""

import csv
import io
import itertools
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from starflow2_jax.data.documents import DocumentError
from starflow2_jax.data.images import locate
from starflow2_jax.data.readers import Found, files_of, found, open_tar
from starflow2_jax.data.rows import EDITS, RowOptions
from starflow2_jax.errors import UserError
from starflow2_jax.text_files import LargeError, bounded_lines, reason, shorten

TAR, MEMBER = "tar", "file"  # columns
EDITED, INSTRUCTION = "edited_file", "edit_instruction"  # columns of edits: the picture that results, and the words
LONGEST = 2**24  # characters of a field


class TarIndexReader:
    """The rows of TSV files with a header, in which `tar` names a tar file and `file` a picture in it.

    Other columns are captions. A row with the columns `edit_instruction` and `edited_file` is an edit. A unit is a run
    of neighbouring rows of one tar file. Memory holds a few numbers per unit.

    path: a file, a folder of *.tsv files, or a pattern; relative paths in it begin at its folder. Raises UserError.
    """

    def __init__(self, path: str, options: RowOptions):
        self.options, self.files = options, files_of(path, "tsv")
        self.runs: list[
            tuple[int, int, int]
        ] = []  # the file of each unit, and its rows: the first and the one after the last
        for i, file in enumerate(self.files):
            row = 0
            for _, rows in itertools.groupby(_rows(file), lambda each: each[TAR]):
                first, row = row, row + sum(1 for _ in rows)
                self.runs.append((i, first, row))
        self.units = len(self.runs)

    def read(self, first: int, last: int) -> Iterator[Found]:
        """See Reader."""
        units = zip(range(first, last), self.runs[first:last], strict=True)
        for number, runs in itertools.groupby(units, lambda each: each[1][0]):
            file, rows, at = self.files[number], _rows(self.files[number]), 0
            for unit, (_, begin, end) in runs:
                run = list(itertools.islice(rows, begin - at, end - at))
                yield from self._run(unit, file, begin, run)
                at = end

    def _run(self, unit: int, file: epath.Path, begin: int, rows: list[Mapping[str, str]]) -> Iterator[Found]:
        """The documents of a unit. begin: the number of its first row."""
        try:
            path = locate(rows[0][TAR], file.parent)
            with path.open("rb") as stream, open_tar(stream) as tar:
                for i, row in enumerate(rows, begin):
                    yield self._document(unit, f"{file}, row {i}", row, tar, file.parent)
        except (tarfile.TarError, OSError, EOFError, UserError) as error:
            yield Found(unit, str(file), DocumentError(f"{shorten(rows[0][TAR])} cannot be read ({reason(error)})"))

    def _document(
        self, unit: int, place: str, row: Mapping[str, str], tar: tarfile.TarFile, folder: epath.Path
    ) -> Found:
        try:
            columns: dict[str, Any] = {**row, self.options.image: _member(tar, row[MEMBER])}
            if row.get(INSTRUCTION) and row.get(EDITED):
                pictures = [columns[self.options.image], _member(tar, row[EDITED])]
                columns |= dict(zip(EDITS, (pictures, [row[INSTRUCTION]]), strict=True))
        except DocumentError as error:
            return Found(unit, place, error)
        return found(unit, place, columns, self.options, folder)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    try:
        file = tar.extractfile(name)
        content = file.read() if file else b""
    except (KeyError, tarfile.TarError, OSError, EOFError) as error:
        raise DocumentError(f"its tar file has no {name!r} that can be read ({reason(error)})") from None
    if not content:
        raise DocumentError(f"the member {name!r} of its tar file is empty or not a file")
    return content


def _rows(file: epath.Path) -> Iterator[Mapping[str, str]]:
    """The rows of a TSV file by column. Raises UserError for a file without the columns, or that is no UTF-8."""
    csv.field_size_limit(LONGEST)
    with file.open("rb") as stream:
        lines = bounded_lines(io.TextIOWrapper(stream, "utf-8-sig", newline=""), LONGEST)
        rows = csv.DictReader(lines, delimiter="\t", restval="")
        try:
            if missing := [name for name in (TAR, MEMBER) if name not in (rows.fieldnames or ())]:
                raise UserError(
                    f"{shorten(file)} has no column {' and no column '.join(missing)} in its first line; add it"
                )
            yield from rows
        except (csv.Error, UnicodeDecodeError, LargeError) as error:
            raise UserError(
                f"{shorten(file)}, line {rows.line_num + 1}, cannot be read ({reason(error)}); correct or remove it"
            ) from None
