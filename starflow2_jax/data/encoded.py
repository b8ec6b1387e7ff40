"""A folder that `starflow2 encode` has written: shards of records in ArrayRecord files, and index.json."""

import bisect
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from starflow2_jax.codecs.fingerprint import unpacked
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data.documents import DocumentError, Draft
from starflow2_jax.data.images import locate
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.records import unpack
from starflow2_jax.errors import UserError
from starflow2_jax.fields import option
from starflow2_jax.text_files import reason, shorten

FORMAT = 1
INDEX, DUPLICATES, CODEC = "index.json", "duplicates.npy", "codec.safetensors"


@dataclass(frozen=True)
class EncodedOptions:
    """How shards in a bucket are read."""

    cache: str = option("folder on this machine for shards of s3://, which are copied when they are first read", "")


@dataclass
class _Shard:
    """All records of a file, in the form that spares ArrayRecordDataSource opening the file to count them."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class EncodedDocuments(Source):
    """A folder that `starflow2 encode` has written, on disk or in a bucket.

    Memory holds the names of the shards, and 8 bytes per duplicate that is passed over. Raises UserError for a folder
    that is not complete, or of another version.
    """

    Options = EncodedOptions

    def __init__(self, path: str, options: EncodedOptions = EncodedOptions()):  # noqa: B008 - it is frozen
        self.folder = locate(str(path), epath.Path(), "folder")
        self.cache = Path(options.cache) if options.cache else None
        if str(self.folder).startswith("s3://") and not self.cache:
            raise UserError(
                f"shards in {shorten(path)} are read from local copies; set the source's cache to a folder for them"
            )
        self.place = shorten(self.folder)
        self.index = read_index(self.folder)
        self.shards: list[tuple[str, int]] = [(each["file"], each["records"]) for each in self.index["shards"]]
        self.ends = list(itertools.accumulate(count for _, count in self.shards))
        latents = self.index["latents"]
        self.shape = (*latents["grid"], latents["channels"]) if latents else (0, 0, 0)
        self.kept_before = self._duplicates()
        self._open: dict[int, ArrayRecordDataSource] = {}

    def _duplicates(self) -> np.ndarray:
        """For each record that is passed over, the number of kept records before it; ascending."""
        if not self.index["duplicates"]:
            return np.zeros(0, np.int64)
        with (self.folder / DUPLICATES).open("rb") as file:
            records = np.load(file, allow_pickle=False)
        return records - np.arange(len(records))

    def __len__(self) -> int:
        return self.index["documents"]

    def __getitem__(self, index: int) -> Draft:
        number = index
        if len(self.kept_before):
            number += int(np.searchsorted(self.kept_before, index, side="right"))
        shard = bisect.bisect_right(self.ends, number)
        name, count = self.shards[shard]
        record = number - (self.ends[shard] - count)
        place = f"{self.place}/{name}, record {record}"
        try:
            content = self._records(shard)[record]
        except (OSError, RuntimeError, ValueError, IndexError) as error:  # of ArrayRecord's reader
            raise DocumentError(f"{place} cannot be read ({reason(error)})") from None
        return unpack(content, place, self.shape)

    def _records(self, shard: int) -> ArrayRecordDataSource:
        if shard not in self._open:
            name, count = self.shards[shard]
            path = self.folder / name
            if self.cache and str(path).startswith("s3://"):
                path = _copied(path, self.cache)
            self._open[shard] = ArrayRecordDataSource([_Shard(str(path), count, count)])
        return self._open[shard]

    def codec(self) -> Codec | None:
        """See Source."""
        latents = self.index["latents"]
        if not latents:
            return None
        weights = (self.folder / CODEC).read_bytes() if latents["weights"] else b""
        return unpacked(latents["codec"], weights)

    def encoded_by(self) -> str | None:
        """See Source."""
        latents = self.index["latents"]
        return latents["fingerprint"] if latents else None


def read_index(folder: epath.Path) -> dict[str, Any]:
    """The values of a folder's index.json. Raises UserError."""
    place = shorten(folder / INDEX)
    try:
        index = json.loads((folder / INDEX).read_bytes())
        if index["format"] != FORMAT:
            raise UserError(f"{place} has the format {index['format']}, and this version reads {FORMAT}; encode again")
        _ = index["shards"], index["documents"], index["duplicates"], index["latents"]
    except FileNotFoundError:
        raise UserError(f"{place} does not exist; `starflow2 encode` writes it when all shards are done") from None
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place} cannot be read ({reason(error)}); start `starflow2 encode` again") from None
    return index


def _copied(path: epath.Path, cache: Path) -> Path:
    """A copy on disk of a file in a bucket. Several processes may ask for it at once."""
    copy = cache / str(path).partition("://")[2]
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{np.random.default_rng().integers(2**60):x}.partial")
        partial.write_bytes(path.read_bytes())
        partial.replace(copy)
    return copy
