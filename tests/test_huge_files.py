"""A sparse file of a terabyte, or a device that never ends, is refused from its first bytes by everything that reads
files.

A test that reads on would last for an hour, so an alarm ends it.
"""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import webdataset
from picture_files import png
from refused import refused

from starflow2_jax.data import jsonl
from starflow2_jax.data.documents import DocumentError, ImageError
from starflow2_jax.data.images import read_image
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.readers import ParquetReader, TarReader
from starflow2_jax.data.rows import RowOptions
from starflow2_jax.data.tar_index import TarIndexReader
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.frechet import Statistics
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.extensions import import_file
from starflow2_jax.text_files import read_json_file, read_lines

HUGE = 10**12  # bytes
OPTIONS = RowOptions()


class Endless(BaseException):
    """The whole file is read. No `except OSError` may catch this."""


@pytest.fixture(autouse=True)
def alarm():
    def ring(*_):
        raise Endless

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sparse(path: Path, begin: bytes = b"") -> Path:
    path.write_bytes(begin)
    os.truncate(path, HUGE)
    return path


def tar(path: Path, count: int) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(count):
            writer.write({"__key__": str(i), "png": png(i), "txt": "a zebra"})


@pytest.mark.parametrize(
    "read, name, saying",
    [
        (read_lines, "captions.txt", "larger than 2000000000 bytes"),
        (read_json_file, "document.json", "larger than 2000000000 bytes"),
        (read_image, "image.png", "larger than 536870912 bytes"),
        (read_image, "latents.npy", "larger than 536870912 bytes"),
        (JsonlDocuments, "documents.jsonl", "line 1 holds NUL bytes"),
        (TarIndexReader, "pictures.tsv", "a line holds NUL"),
        (import_file, "experiment.py", "too long for a Python file"),
        (Statistics.load, "statistics.npz", "is no .npz file"),
    ],
)
def test_a_sparse_file(tmp_path, read, name, saying):
    path = sparse(tmp_path / name)
    more = {read_image: (1,), TarIndexReader: (OPTIONS,)}.get(read, ())
    refused(UserError, read, path if read is Statistics.load else str(path), *more, saying=(name, saying))


def test_a_file_that_was_not_written_to_its_end(tmp_path):
    """The room was reserved, and then the copy was interrupted."""
    good = b'[{"text": "a"}]\n'
    refused(DocumentError, JsonlDocuments, sparse(tmp_path / "a.jsonl", 2 * good + b"\n"), saying=("line 4 holds NUL",))
    refused(DocumentError, JsonlDocuments, sparse(tmp_path / "b.jsonl", b"x" * 2**25), saying=("line 1 holds NUL",))
    talk = b'[{"messages": [{"role": "user", "content": "a"}]},'
    refused(DocumentError, JsonlDocuments, sparse(tmp_path / "c.json", talk), saying=("record 1 of the array",))


def test_a_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "ENDLESS", 2**25)
    (tmp_path / "a.jsonl").write_bytes(b'[{"text": "a"}]\n' + b"x" * 2**26)
    refused(DocumentError, JsonlDocuments, tmp_path / "a.jsonl", saying=("line 2 is longer than",))


@pytest.mark.parametrize("benchmark", ["mme", "mmbench"])
def test_a_table_of_a_benchmark(tmp_path, benchmark):
    path = sparse(tmp_path / "table.tsv", b"index\tquestion\n")
    refused(UserError, open_benchmark, benchmark, str(path), None, None, saying=("table.tsv", "a line holds NUL"))


def test_parquet_and_tar(tmp_path):
    """They are read in parts, so what is wrong is one fault of the file."""
    sparse(tmp_path / "a.parquet")
    [fault] = ParquetReader(str(tmp_path / "a.parquet"), OPTIONS).read(0, 1)
    assert "cannot be read" in str(fault.draft)
    sparse(tmp_path / "a.tar")
    (tmp_path / "a.tsv").write_text("tar\tfile\na.tar\ta.png\n")
    tar(tmp_path / "whole.tar", 2)
    sparse(tmp_path / "b.tar", (tmp_path / "whole.tar").read_bytes())
    [fault] = TarReader(str(tmp_path / "a.tar"), OPTIONS).read(0, 1)
    [named] = TarIndexReader(str(tmp_path / "a.tsv"), OPTIONS).read(0, 1)
    _, _, rest = TarReader(str(tmp_path / "b.tar"), OPTIONS).read(0, 1)
    assert "begins with zeros" in str(fault.draft) and "begins with zeros" in str(named.draft)
    assert "damaged or cut off after the sample" in str(rest.draft)


def test_devices(tmp_path):
    refused(UserError, read_lines, "/dev/zero", saying=("/dev/zero", "byte 0 is NUL"))
    refused(ImageError, read_image, "/dev/zero", 1, saying=("/dev/zero", "larger than"))
    os.mkfifo(tmp_path / "pipe.png")
    refused(ImageError, read_image, tmp_path / "pipe.png", 1, saying=("pipe.png", "it is a pipe"))


def test_files_of_another_encoding(tmp_path):
    """UTF-16, with and without a byte order mark."""
    for encoding, saying in (("utf-16", "byte 0 is not UTF-8"), ("utf-16-le", "byte 1 is NUL")):
        (tmp_path / "captions").write_text("a seven\n", encoding=encoding)
        refused(UserError, read_lines, tmp_path / "captions", saying=("captions", saying, "save it as UTF-8"))


def test_what_is_whole_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    assert read_image(tmp_path / "a.png", 3).shape[2] == 3
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 1), np.float32))
    assert read_image(tmp_path / "a.npy", 1).shape == (2, 2, 1)
