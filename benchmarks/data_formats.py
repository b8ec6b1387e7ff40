"""Formats of data: encoding, random reads of shards, and opening a large JSONL file.

    python benchmarks/data_formats.py [--pictures 1000] [--latents 1000000] [--documents 1000000] [--folder DIR]

Prints, one JSON line each:

- pictures a second that one process encodes from parquet and from tar, scaled from 768 to 256 pixels, and with a codec;
- latents of 16 x 16 x 64 read at random from the shards of `starflow2 encode`, as drafts of documents, beside grain's
  own ArrayRecord data source, which reads the same records as bytes, and beside the same with the numbers made fp32;
- seconds and memory to open a JSONL file, and documents a second read from it at random.
"""

import argparse
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grain
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from PIL import Image as Pillow

from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.encoded import EncodedDocuments
from starflow2_jax.data.encoding import Encoding, encode
from starflow2_jax.data.readers import Found, ParquetReader, Reader, TarReader
from starflow2_jax.data.rows import RowOptions

STORED, SIDE, PATCH = 768, 256, 16
GRID, CHANNELS = (16, 16), 64
REPEATS = 5
OPEN = """
import json, random, sys, time
from pathlib import Path
from starflow2_jax.data.jsonl import JsonlDocuments

def megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))

before, begin = megabytes(), time.perf_counter()
source = JsonlDocuments(sys.argv[1])
seconds, order = time.perf_counter() - begin, [random.randrange(len(source)) for _ in range(10_000)]
begin = time.perf_counter()
for i in order:
    source[i]
rate, after = len(order) / (time.perf_counter() - begin), megabytes()
memory = dict(megabytes_of_the_process=after, megabytes_more=after - before)
print(json.dumps(dict(seconds_to_open=seconds, **memory, reads_per_second=rate)))
"""


def picture(rng: np.random.Generator) -> bytes:
    """A photo-like JPEG file: smooth colours with some noise."""
    size = (STORED * 4 // 3, STORED)
    coarse = Pillow.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Pillow.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 6, (size[1], size[0], 3)).astype(np.int16)
    file = io.BytesIO()
    Pillow.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_pictures(folder: Path, count: int) -> None:
    """The same pictures as a parquet file and as a tar file."""
    rng = np.random.default_rng(0)
    files = [picture(rng) for _ in range(count)]
    captions = [f"photo {i}" for i in range(count)]
    pq.write_table(pa.table({"image": files, "caption": captions}), folder / "a.parquet", row_group_size=64)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, (file, caption) in enumerate(zip(files, captions, strict=True)):
            for suffix, content in (("jpg", file), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def encoding(folder: Path, count: int) -> None:
    write_pictures(folder, count)
    codec = PatchCodec((SIDE, SIDE), 3, PATCH, (0.0,) * (3 * PATCH**2), (1.0,) * (3 * PATCH**2))
    readers: dict[str, Callable[[], Reader]] = {
        "parquet": lambda: ParquetReader(str(folder / "a.parquet"), RowOptions()),
        "tar": lambda: TarReader(str(folder / "a.tar"), RowOptions()),
    }
    for (name, reader), (what, made) in itertools.product(readers.items(), (("pictures", None), ("latents", codec))):
        how = Encoding(source=name, shards=1, size=SIDE, codec=made)
        begin = time.perf_counter()
        index = encode(reader(), epath.Path(folder / f"{name}-{what}"), how)
        assert index is not None and index["documents"] == count
        say(f"encode {name} to {what}", pictures_per_second=count / (time.perf_counter() - begin))


class Latents:
    """A reader of documents that are a caption and an image of random latents."""

    def __init__(self, count: int):
        self.units = count
        self.some = np.random.default_rng(0).standard_normal((256, *GRID, CHANNELS)).astype(np.float32)

    def read(self, first: int, last: int):
        """See Reader."""
        for i in range(first, last):
            latents = self.some[i % len(self.some)].copy()
            latents.flat[0] = i  # so that there are no duplicates
            yield Found(i, str(i), [Text(f"photo {i}"), Image(latents, generate=True)])


def reading(folder: Path, count: int) -> None:
    encode(Latents(count), epath.Path(folder), Encoding(source="", shards=16, codec=LatentCodec(GRID, CHANNELS)))
    documents = EncodedDocuments(str(folder))
    plain = grain.sources.ArrayRecordDataSource(sorted(map(str, folder.glob("*.array_record"))))
    size = math.prod((*GRID, CHANNELS))
    assert len(documents) == len(plain) == count
    sources = {
        "ours": documents.__getitem__,
        "grain": plain.__getitem__,
        "grain_as_fp32": lambda i: np.frombuffer(plain[i][-2 * size :], ml_dtypes.bfloat16).astype(np.float32),
    }
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for repeat in range(REPEATS):
        for number, (name, read) in enumerate(sources.items()):
            # Each has places of its own, so that none finds in the system's cache what another one read.
            order = np.random.default_rng((repeat, number)).integers(0, count, min(count, 10_000)).tolist()
            begin = time.perf_counter()
            for i in order:
                read(i)
            rates[name].append(len(order) / (time.perf_counter() - begin))
    ratios = {
        f"{name}_to_ours": statistics.median(a / b for a, b in zip(rates[name], rates["ours"], strict=True))
        for name in ("grain", "grain_as_fp32")
    }
    medians = {f"{name}_reads_per_second": statistics.median(each) for name, each in rates.items()}
    say(f"random reads of {count} latents", **medians, **ratios)


def opening(folder: Path, count: int) -> None:
    with (folder / "documents.jsonl").open("w") as file:
        for i in range(count):
            file.write(
                json.dumps([{"text": f"a photo of thing number {i}"}, {"image": f"{i}.jpg", "generate": True}]) + "\n"
            )
    found = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder / "documents.jsonl")], check=True, capture_output=True
    )
    say(f"JSONL of {count} documents", **json.loads(found.stdout))


def say(what: str, **numbers: float) -> None:
    print(json.dumps({"what": what, **{name: float(f"{number:.4g}") for name, number in numbers.items()}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the files are written for the time of the run; latents take 32 kB each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for measure, count in ((encoding, args.pictures), (reading, args.latents), (opening, args.documents)):
            folder = Path(scratch) / measure.__name__
            folder.mkdir()
            if count:
                measure(folder, count)


if __name__ == "__main__":
    main()
