"""Local copies of public data sets as rows: parquet files, folders of `datasets.save_to_disk`, and VLMEvalKit's .tsv
files.
"""

import ast
import base64
import binascii
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from starflow2_jax.data.documents import StoredImage
from starflow2_jax.data.rows import picture
from starflow2_jax.errors import UserError, shown
from starflow2_jax.evaluation.user_files import Needed
from starflow2_jax.text_files import bounded_lines, reason

Row = dict[str, Any]
LONGEST = 2**31 - 1  # characters of a .tsv field: a picture in base64
REFERENCE = 64  # a shorter "picture" of a .tsv file is the index of the row that holds it


def read(needed: Needed, path: Path, split: str) -> list[Row]:
    """The rows of a table; memory holds their pictures as files, not decoded.

    path: a .tsv or .parquet file, a folder of `save_to_disk`, or one of parquet files, in which `split` is read.
    Raises UserError.
    """
    if path.suffix == ".tsv":
        return _tsv(needed, path)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _saved(needed, path, split)
    return _parquet(needed, path, split)


def splits(path: Path) -> tuple[str, ...]:
    """The splits among which `read` chooses: those of a folder; () for a file or for a data set without splits."""
    if (path / "state.json").is_file():
        return ()
    if (path / "dataset_dict.json").is_file():
        return tuple(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
    return tuple(sorted({_split(file) for file in path.rglob("*.parquet")}))


def columns(row: Row) -> dict[str, Any]:
    """The columns of a row that are no pictures, for a table of answers."""
    return {name: value for name, value in row.items() if not _is_picture(name, value)}


def pictures(row: Row, folder: Path) -> dict[int, StoredImage]:
    """The pictures of a row by their number, from 1: the columns image_1, image_2, ..., or `image`, which may be a
    list.

    folder: where relative paths begin. Raises ImageError.
    """
    named = {i: row[f"image_{i}"] for i in range(1, 10) if row.get(f"image_{i}") is not None}
    if not named:
        value = row["image"] if row.get("image") is not None else row.get("image_path")
        named = {i: each for i, each in enumerate(listed(value), 1) if each is not None}
    return {i: picture(value, epath.Path(folder)) for i, value in named.items()}


def _is_picture(name: str, value: object) -> bool:
    return name == "image" or name.startswith("image_") and name != "image_path" or isinstance(value, bytes)


def _tsv(needed: Needed, path: Path) -> list[Row]:
    csv.field_size_limit(LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found: list[Row] = [
                {name: value or None for name, value in row.items()}
                for row in csv.DictReader(bounded_lines(file, LONGEST), delimiter="\t")
            ]
        for row in found:
            row["image"] = _decoded(row.get("image"))
    except (OSError, csv.Error, ValueError) as error:
        needed.refuse(path, f"cannot be read as a table ({reason(error)})")
    whole = {row.get("index"): row["image"] for row in found if isinstance(row["image"], list)}
    for i, row in enumerate(found):
        where, image = f"{path}, row {i},", row["image"]
        if None in row:  # where DictReader puts the fields beyond the header
            needed.refuse(where, "has more fields than the header")
        if isinstance(image, str):
            if image not in whole:
                needed.refuse(where, f"has the image {shown(image)}, but no row of this index holds a picture")
            row["image"] = whole[image]
    return found


def _decoded(text: str | None) -> list[bytes] | str | None:
    """Pictures in base64, one or a list of them, as bytes; the index of another row as it is."""
    if text is None or len(text) <= REFERENCE and not text.startswith("["):
        return text
    try:
        return [base64.b64decode(each, validate=True) for each in listed(text)]
    except (binascii.Error, TypeError):
        raise ValueError("a picture is no base64") from None


def _saved(needed: Needed, path: Path, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError("this folder needs `datasets`; install it with `pip install 'starflow2_jax[hf]'`") from None
    from starflow2_jax.data.huggingface import undecoded

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise many kinds of exceptions
        needed.refuse(path, f"cannot be loaded as a data set ({reason(error)})")
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            needed.refuse(path, f"has the splits {', '.join(map(str, loaded))} and no {split!r}")
        loaded = loaded[split]
    return list(undecoded(loaded, datasets.Image))


def _parquet(needed: Needed, path: Path, split: str) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("parquet files need pyarrow; install it with `pip install 'starflow2_jax[encode]'`") from None
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    tables: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        tables.setdefault((file.parent, _split(file)), []).append(file)
    chosen = tables if len(tables) == 1 else {key: several for key, several in tables.items() if key[1] == split}
    if len(chosen) != 1:
        names = ", ".join(sorted(f"{folder.relative_to(path)}/{name}" for folder, name in tables)) or "no parquet files"
        needed.refuse(path, f"holds {names}, of which not exactly one is the split {split!r} (name its folder)")
    [several] = chosen.values()
    try:
        return [row for file in several for row in parquet.read_table(file).to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        needed.refuse(path, f"cannot be read as parquet ({reason(error)})")


def _split(file: Path) -> str:
    """The split in the name of a parquet file, such as validation-00000-of-00001.parquet."""
    return file.stem.partition("-")[0]


def listed(value: object) -> list[Any]:
    """A column that holds a list, or the text of one in Python's or JSON's form; [value] if it is no list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return [value]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
