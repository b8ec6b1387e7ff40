"""Sequential readers of the formats that `starflow2 encode` takes."""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Protocol

from etils import epath

from starflow2_jax.data.documents import DocumentError, Draft
from starflow2_jax.data.images import locate
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.rows import RowOptions, from_row, is_conversation
from starflow2_jax.errors import UserError
from starflow2_jax.text_files import parse_json, reason, shorten

BATCH = 64  # rows of a parquet file that are read at a time
PADDING = 2**24  # bytes; fewer zeros follow the last file of a tar file
PICTURES = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|bmp|gif|tiff?)", re.IGNORECASE)  # suffixes in tar files


@dataclass(frozen=True)
class Found:
    """A document, or what is wrong with it; the unit that it belongs to, and its place for messages."""

    unit: int
    place: str
    draft: Draft | DocumentError


class Reader(Protocol):
    """Documents in their order. `units`: what shards divide among themselves, such as documents or files."""

    units: int

    def read(self, first: int, last: int) -> Iterator[Found]:
        """The documents of the units from `first` up to `last`."""
        ...


class SourceReader:
    """The documents of a source that has random access. A unit is a document."""

    def __init__(self, source: Source):
        self.source, self.units = source, len(source)

    def read(self, first: int, last: int) -> Iterator[Found]:
        """See Reader."""
        for i in range(first, last):
            try:
                yield Found(i, f"document {i}", self.source[i])
            except DocumentError as error:
                yield Found(i, f"document {i}", error)


class ParquetReader:
    """The rows of parquet files. A unit is a row; a file whose footer cannot be read is one unit.

    path: a file, a folder of *.parquet files, or a pattern. Raises UserError.
    """

    def __init__(self, path: str, options: RowOptions):
        self.options, self.files = options, files_of(path, "parquet")
        self.faults: dict[int, DocumentError] = {}
        self.ends, self.units = [], 0
        for i, file in enumerate(self.files):
            try:
                with file.open("rb") as stream:
                    self.units += _parquet(stream).metadata.num_rows
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
                self.faults[i] = DocumentError(f"the file cannot be read ({reason(error)})")
                self.units += 1
            self.ends.append(self.units)

    def read(self, first: int, last: int) -> Iterator[Found]:
        """See Reader."""
        for i, (file, end) in enumerate(zip(self.files, self.ends, strict=True)):
            begin = self.ends[i - 1] if i else 0
            if end <= first or begin >= last:
                continue
            if i in self.faults:
                yield Found(begin, str(file), self.faults[i])
            else:
                for each in self._rows(file, max(first - begin, 0), min(last, end) - begin):
                    yield replace(each, unit=begin + each.unit)

    def _rows(self, file: epath.Path, first: int, last: int) -> Iterator[Found]:
        """The rows of a file; their units are counted within the file."""
        with file.open("rb") as stream:
            parquet, begin = _parquet(stream), 0
            for group in range(parquet.num_row_groups):
                end = begin + parquet.metadata.row_group(group).num_rows
                if end > first and begin < last:
                    yield from self._group(parquet, group, file, begin, max(first, begin), min(last, end))
                begin = end

    def _group(self, parquet: Any, group: int, file: epath.Path, row: int, first: int, last: int) -> Iterator[Found]:
        """The rows of a row group, which begins at `row`, from `first` up to `last`."""
        try:
            for batch in parquet.iter_batches(batch_size=BATCH, row_groups=[group]):
                if row + len(batch) > first and row < last:
                    for i, values in enumerate(batch.to_pylist(), row):
                        if first <= i < last:
                            yield found(i, f"{file}, row {i}", values, self.options, file.parent)
                row += len(batch)
        except (OSError, ValueError) as error:
            fault = DocumentError(f"the rest of the row group is damaged ({reason(error)})")
            yield Found(max(row, first), f"{file}, row {max(row, first)}", fault)


class TarReader:
    """The samples of tar files in webdataset's layout: the files NAME.* are one sample. A unit is a tar file.

    A sample has pictures (NAME.jpg), a caption (NAME.txt), further columns (NAME.json), and its class in the column
    "cls" (NAME.cls). path: a file, a folder of *.tar files, or a pattern. classes: names by number. Raises UserError.
    """

    def __init__(self, path: str, options: RowOptions, classes: Sequence[str] = ()):
        self.options, self.files, self.names = options, files_of(path, "tar"), classes
        self.units = len(self.files)

    def read(self, first: int, last: int) -> Iterator[Found]:
        """See Reader."""
        for unit, file in enumerate(self.files[first:last], first):
            name = ""
            try:
                for name, members in _samples(file):
                    yield self._sample(unit, f"{file}, sample {shorten(name)}", members, file.parent)
            except (tarfile.TarError, OSError, EOFError) as error:
                fault = f"the file is damaged or cut off after the sample {name!r} ({reason(error)})"
                yield Found(unit, str(file), DocumentError(fault))

    def _sample(self, unit: int, place: str, members: dict[str, bytes], folder: epath.Path) -> Found:
        row: dict[str, Any] = {}
        try:
            for suffix, content in members.items():
                if suffix.endswith("json"):
                    values = parse_json("its .json", content.decode("utf-8"), DocumentError)
                    row |= values if isinstance(values, dict) else {}
            for suffix, content in members.items():
                if suffix.endswith("txt"):
                    row["caption"] = content.decode("utf-8")
                elif suffix.endswith("cls") and "cls" in self.options.captions:
                    row["cls"] = self._class(content.decode("utf-8").strip())
        except DocumentError as error:
            return Found(unit, place, error)
        except UnicodeDecodeError as error:
            return Found(unit, place, DocumentError(f"its words are not UTF-8 (byte {error.start})"))
        pictures = [content for suffix, content in sorted(members.items()) if PICTURES.fullmatch(suffix)]
        if pictures:
            row |= {"images": pictures} if is_conversation(row) else {self.options.image: pictures[0]}
        return found(unit, place, row, self.options, folder)

    def _class(self, said: str) -> str:
        """The caption of a class, which is given by its name or its number."""
        if said.isdecimal():
            if not (names := self.names):
                raise DocumentError(
                    f"its class is the number {said}, but no names of classes were given; give them with --classes"
                )
            if int(said) >= len(names):
                raise DocumentError(
                    f"its class is the number {said}, but there are {len(names)} names of classes; add the others"
                )
            said = names[int(said)]
        return self.options.template.replace("{}", said)


def _samples(file: epath.Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name, suffix -> content) of the neighbouring members that have one name up to the first dot.

    After the last whole sample, raises the errors of tarfile, and ReadError if the file goes on after its last
    member.
    """
    sample, members, fault = "", {}, None
    with file.open("rb") as stream, open_tar(stream) as tar:
        try:
            for name, suffix, content in _members(tar):
                if members and name != sample:
                    yield sample, members
                    members = {}
                sample, members[suffix] = name, content
        except (tarfile.TarError, OSError, EOFError) as error:
            fault = error
    if members:
        yield sample, members
    if fault:
        raise fault


def open_tar(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar file, compressed or not. Raises the errors of tarfile; it would read on where a sparse file has only
    zeros.
    """
    head = stream.read(PADDING)
    if len(head) == PADDING and not head.strip(b"\0"):
        raise tarfile.ReadError("it begins with zeros")
    stream.seek(0)
    return tarfile.open(fileobj=stream, mode="r:*")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """(name up to the first dot, suffix, content) of the files of a tar file."""
    archive: Any = tar
    for member in tar:
        if member.isfile() and (file := tar.extractfile(member)):
            content = file.read()
            if len(content) != member.size:
                raise tarfile.ReadError("a file is cut off")
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            yield f"{folder}/{stem}" if folder else stem, suffix, content
        archive.members = []  # it would remember all of them
    stream = archive.fileobj
    stream.seek(tar.offset)
    padding = stream.read(PADDING)
    if padding.strip(b"\0") or len(padding) == PADDING:
        raise tarfile.ReadError("what follows is no tar file")
    if not padding:
        raise tarfile.ReadError("its end is missing")


def found(unit: int, place: str, row: Mapping[str, Any], options: RowOptions, folder: epath.Path) -> Found:
    """The document of a row of named columns, or what is wrong with it."""
    try:
        return Found(unit, place, from_row(row, options, folder))
    except DocumentError as error:
        return Found(unit, place, error)


def files_of(path: str, suffix: str) -> list[epath.Path]:
    """The files of a folder with a suffix, those that fit a pattern, or one file. Raises UserError."""
    where = locate(path, epath.Path(), "path")
    if where.is_dir():
        files = sorted(where.glob(f"*.{suffix}"))
    else:
        files = sorted(where.parent.glob(where.name)) if "*" in path else [where] * where.exists()
    if not files:
        raise UserError(
            f"{shorten(path)} has no .{suffix} file; give a file, a folder, or a pattern such as 'data/*.{suffix}'"
        )
    return files


def _parquet(stream: Any) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow; install it with `pip install 'starflow2_jax[encode]'`") from None
    return pyarrow.parquet.ParquetFile(stream)
