"""Documents of any format -> a folder that `encoded.EncodedDocuments` reads: what `starflow2 encode` does."""

import hashlib
import io
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image as Pillow

import starflow2_jax
from starflow2_jax.codecs.fingerprint import fingerprint, packed
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data.documents import DocumentError, Draft, Image, Speaker, StoredImage, Text, Wordings
from starflow2_jax.data.encoded import CODEC, DUPLICATES, FORMAT, INDEX
from starflow2_jax.data.images import ImageReader, opened
from starflow2_jax.data.pictures import Picture
from starflow2_jax.data.readers import Found, Reader
from starflow2_jax.data.records import pack
from starflow2_jax.errors import UserError
from starflow2_jax.text_files import shorten

BATCH = 64  # documents that are encoded together, and images that the codec takes at a time
WRITER = "group_size:1,uncompressed"  # each record is read alone; pictures and latents hardly compress


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents are encoded.

    source: its name for index.json. shards: number of files. size: pictures whose short side is longer are scaled down
    to this many pixels and saved as JPEG files of this quality; 0: every picture keeps its file. via: as in
    SourceConfig. codec: flow images are stored as its latents; None: as pictures.
    """

    source: str
    shards: int
    size: int = 0
    quality: int = 95
    via: str = ""
    codec: Codec | None = None

    def description(self) -> dict[str, Any]:
        """JSON values: shards of other values do not belong together."""
        values = {name: getattr(self, name) for name in ("source", "shards", "size", "quality", "via")}
        return values | {"codec": fingerprint(self.codec) if self.codec else None}


def encode(
    reader: Reader,
    out: epath.Path,
    encoding: Encoding,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda units, documents: None,
) -> dict[str, Any] | None:
    """Write those shards of this process, every `processes`-th one, that do not exist yet. The process that writes the
    last shard also writes index.json.

    progress: called with the numbers of units and documents that were read since its last call. Returns the values of
    index.json, or None while other processes have shards to write. Each file is written aside and renamed, so that the
    same call may follow a call that was killed. Raises UserError where `out` has shards of another encoding.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not 1 <= encoding.shards <= reader.units:
        raise UserError(
            f"shards must be from 1 to {reader.units}, the number of files or documents, not {encoding.shards}"
        )
    description = encoding.description()
    ours = _name(0, encoding.shards, "json")[5:]
    if others := [path.name for path in out.glob("[0-9]*-of-*.json") if not path.name.endswith(ours)]:
        raise UserError(f"{out} has {others[0]}, of another number of shards; give that one, or name another --out")
    for shard in range(process, encoding.shards, processes):
        if _finished(out, shard, description) is None:
            _Shard(out, shard, encoding, description).write(reader, progress)
    reports = [_finished(out, shard, description) for shard in range(encoding.shards)]
    done = [report for report in reports if report is not None]
    return _write_index(out, encoding, description, done) if len(done) == len(reports) else None


def to_go(out: epath.Path, encoding: Encoding, units: int, process: int, processes: int) -> int:
    """The units of the shards that `encode` would write."""
    description, total = encoding.description(), 0
    for shard in range(process, encoding.shards, processes):
        if _finished(out, shard, description) is None:
            total += _first(shard + 1, encoding.shards, units) - _first(shard, encoding.shards, units)
    return total


def _first(shard: int, shards: int, units: int) -> int:
    return shard * units // shards


def _name(shard: int, shards: int, suffix: str) -> str:
    return f"{shard:05d}-of-{shards:05d}.{suffix}"


def _finished(out: epath.Path, shard: int, description: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a shard that is complete. It is written last; a machine that lost its power may leave a damaged
    one.
    """
    report = out / _name(shard, description["shards"], "json")
    if not report.exists():
        return None
    try:
        values = json.loads(report.read_bytes())
    except ValueError:
        return None
    if wrong := [key for key in description if values["encoding"].get(key) != description[key]]:
        had = values["encoding"].get(wrong[0])
        raise UserError(f"{out} was begun with {wrong[0]} {had!r}, not {description[wrong[0]]!r}; name another --out")
    return values


def _publish(out: epath.Path, name: str, content: bytes) -> None:
    """Write a file that is whole or absent."""
    if "://" in str(out):
        (out / name).write_bytes(content)  # a bucket shows an object when it is complete
        return
    partial = out / f".{name}.partial"
    partial.write_bytes(content)
    partial.replace(out / name)


class _Shard:
    """Writes a shard: NAME.array_record, NAME.npy (a hash of each document, to find duplicates), and its report
    NAME.json.
    """

    def __init__(self, out: epath.Path, shard: int, encoding: Encoding, description: dict[str, Any]):
        self.out, self.shard, self.encoding, self.description = out, shard, encoding, description
        self.keys: list[int] = []
        self.faults: list[str] = []
        self.skipped: Counter[str] = Counter()
        codec = encoding.codec
        self.moments = np.zeros((2, codec.channels)) if codec else np.zeros((2, 0))
        self.latents = 0
        if codec:
            height, width, _ = codec.image_shape
            self.images = ImageReader(codec.image_channels, (height, width), latents=not codec.is_pixels)

    def write(self, reader: Reader, progress: Callable[[int, int], None]) -> None:
        """Read the shard's share of the units, and write its files."""
        shards, units = self.encoding.shards, reader.units
        name = _name(self.shard, shards, "array_record")
        with tempfile.TemporaryDirectory() as scratch:
            local = "://" not in str(self.out)
            partial = self.out / f".{name}.partial" if local else epath.Path(scratch) / name
            writer = ArrayRecordWriter(str(partial), WRITER)
            first, last = (_first(shard, shards, units) for shard in (self.shard, self.shard + 1))
            found = reader.read(first, last)
            while batch := list(itertools.islice(found, BATCH)):
                for record in self._encoded(batch):
                    writer.write(record)
                progress(batch[-1].unit - first, len(batch))
                first = batch[-1].unit
            progress(last - first, 0)
            writer.close()
            if local:
                partial.replace(self.out / name)
            else:
                partial.copy(self.out / name, overwrite=True)
        self._report()

    def _report(self) -> None:
        shards = self.encoding.shards
        file = io.BytesIO()
        np.save(file, np.array(self.keys, np.uint64))
        _publish(self.out, _name(self.shard, shards, "npy"), file.getvalue())
        report = {
            "encoding": self.description,
            "records": len(self.keys),
            "skipped": dict(sorted(self.skipped.items())),
            "faults": self.faults,
            "latents": self.latents,
            "moments": self.moments.tolist(),
        }
        _publish(self.out, _name(self.shard, shards, "json"), json.dumps(report, indent=1).encode())

    def _encoded(self, batch: list[Found]) -> Iterator[bytes]:
        """The records of the documents that can be read."""
        drafts = []
        for found in batch:
            try:
                if isinstance(found.draft, DocumentError):
                    raise found.draft
                drafts.append(self._read(found.draft))
            except DocumentError as error:
                self.skipped[error.kind] += 1
                self.faults.append(shorten(f"{found.place}: {error}", 1000))
        latents = iter(self._latents([p for draft in drafts for p in draft if isinstance(p, Image)]))
        for draft in drafts:
            yield pack([next(latents) if isinstance(part, Image) else part for part in draft])

    def _read(self, draft: Draft) -> Draft:
        """The draft with its images as they are stored, but for those that the codec is to encode, which are read."""
        digest, read = hashlib.blake2b(digest_size=8), []
        for i, part in enumerate(draft):
            if isinstance(part, Image | StoredImage):
                if self.encoding.via and not part.generate:
                    part = replace(part, via=self.encoding.via)
                try:
                    part, pixels = self._image(part)
                except DocumentError as error:
                    raise type(error)(f"part {i} of the document: {error}") from None
                digest.update(pixels)
            read.append(part)
        if not any(isinstance(part, Image | StoredImage) and part.generate for part in read):
            words = [part for part in read if isinstance(part, Text | Wordings | Speaker)]
            digest.update(repr(words).encode("utf-8", "surrogatepass"))
        self.keys.append(int.from_bytes(digest.digest(), "little"))
        return read

    def _image(self, part: Image | StoredImage) -> tuple[Image | StoredImage, bytes]:
        """An image as it is stored, or read for the codec; and its pixels, to find duplicates."""
        if self.encoding.codec and part.via == "flow":
            image = self.images(part) if isinstance(part, StoredImage) else part
            shape = self.encoding.codec.image_shape
            if image.pixels.shape != shape:
                raise DocumentError(f"the image has the shape {image.pixels.shape}, but the codec takes {shape}")
            return image, image.pixels.tobytes()
        if isinstance(part, Image):
            raise DocumentError("the image is an array, which is stored only as latents of a codec; give --codec")
        with opened(part) as file:
            content = file.read()
        with opened(replace(part, open=lambda: io.BytesIO(content))) as file:
            pixels = Picture(file).opaque(3, self.encoding.size or None)
        if scaled := _scaled(pixels, self.encoding):
            pixels, file = scaled, io.BytesIO()
            scaled.save(file, "JPEG", quality=self.encoding.quality, subsampling=0)
            content = file.getvalue()
        return replace(part, open=lambda: io.BytesIO(content)), np.array(pixels.size).tobytes() + pixels.tobytes()

    def _latents(self, images: list[Image]) -> Iterator[Image]:
        codec = self.encoding.codec
        if codec is None:
            return
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            pixels = np.zeros((BATCH, *codec.image_shape), np.float32)  # of one size, so that a codec is compiled once
            pixels[: len(some)] = [image.pixels for image in some]
            for image, latents in zip(some, np.asarray(codec.encode(pixels), np.float32), strict=False):
                tokens = latents.reshape(-1, codec.channels).astype(np.float64)
                self.moments += tokens.sum(0), (tokens**2).sum(0)
                self.latents += len(tokens)
                yield replace(image, pixels=latents, encoded=True)


def _scaled(picture: Pillow.Image, encoding: Encoding) -> Pillow.Image | None:
    """A picture that is too large, scaled down; None: it is not."""
    short = min(picture.size)
    if not encoding.size or short <= encoding.size:
        return None
    width, height = (max(round(side * encoding.size / short), encoding.size) for side in picture.size)
    return picture.resize((width, height), Pillow.Resampling.LANCZOS)


def _write_index(
    out: epath.Path, encoding: Encoding, description: dict[str, Any], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the index of all shards. Any process may do this, and each would write the same."""
    keys = np.concatenate([_keys(out, shard, encoding.shards) for shard in range(encoding.shards)])
    _, first = np.unique(keys, return_index=True)
    duplicates = np.setdiff1d(np.arange(len(keys)), first)
    if len(duplicates):
        file = io.BytesIO()
        np.save(file, duplicates)
        _publish(out, DUPLICATES, file.getvalue())
    _publish(out, "skipped.txt", "".join(f"{fault}\n" for report in reports for fault in report["faults"]).encode())
    skipped = sum((Counter(report["skipped"]) for report in reports), Counter())
    index = {
        "format": FORMAT,
        "documents": len(keys) - len(duplicates),
        "duplicates": len(duplicates),
        "skipped": dict(sorted(skipped.items())),
        "encoding": description,
        "latents": _write_codec(out, encoding.codec, reports) if encoding.codec else None,
        "versions": {
            "starflow2_jax": starflow2_jax.__version__,
            **{name: version(name) for name in ("numpy", "pillow", "array_record", "jax")},
        },
        "shards": [
            {"file": _name(shard, encoding.shards, "array_record"), "records": report["records"]}
            for shard, report in enumerate(reports)
        ],
    }
    _publish(out, INDEX, json.dumps(index, indent=1).encode())
    return index


def _keys(out: epath.Path, shard: int, shards: int) -> np.ndarray:
    with (out / _name(shard, shards, "npy")).open("rb") as file:
        return np.load(file, allow_pickle=False)


def _write_codec(out: epath.Path, codec: Codec, reports: list[dict[str, Any]]) -> dict[str, Any]:
    values, weights = packed(codec)
    if weights:
        _publish(out, CODEC, weights)
    count = max(sum(report["latents"] for report in reports), 1)
    first, second = np.sum([report["moments"] for report in reports], axis=0) / count
    return {
        "grid": list(codec.grid),
        "channels": codec.channels,
        "mean": first.tolist(),
        "deviation": np.sqrt(np.maximum(second - first**2, 0)).tolist(),
        "codec": values,
        "weights": bool(weights),
        "fingerprint": fingerprint(codec),
    }
