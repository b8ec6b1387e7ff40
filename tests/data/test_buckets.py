"""Documents, pictures and shards in buckets, of a server on this machine that speaks the protocol of S3 or of
Google's.
"""

import json
import logging

import boto3
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer
from picture_files import pixels, png
from refused import refused

from starflow2_jax.data import images, sources
from starflow2_jax.data.documents import DocumentError, Text
from starflow2_jax.data.encoded import EncodedDocuments, EncodedOptions
from starflow2_jax.data.encoding import Encoding, encode
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.readers import ParquetReader, SourceReader
from starflow2_jax.data.rows import RowOptions
from starflow2_jax.errors import UserError

COUNT = 12
S3 = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (S3 | {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket/data"
    server.stop()


@pytest.fixture(scope="module")
def gs():
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):  # of gcsfs; of ArrayRecord's reader
            patch.setenv(name, f"http://{host}:{port}")
        yield "gs://bucket/data"
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def folder(request, caplog):
    """A folder in a bucket, with a JSONL file and its pictures."""
    caplog.set_level(logging.ERROR)
    place = epath.Path(request.getfixturevalue(request.param))
    backend.fsspec_backend._get_filesystem.cache_clear()  # another test may have looked for a bucket before
    backend.fsspec_backend.fs(place).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    lines = []
    for i in range(COUNT):
        (place / "pictures" / f"{i}.png").write_bytes(png(i))
        path = f"pictures/{i}.png" if i % 2 else f"{place}/pictures/{i}.png"
        lines.append(json.dumps([{"text": f"zebra {i}"}, {"image": path, "generate": True}]))
    (place / "data.jsonl").write_text("\n".join(lines))
    return place


def holds(source, count: int = COUNT) -> None:
    assert len(source) == count
    for i in range(count):
        words, image = source[i]
        assert words == Text(f"zebra {i}") and image.generate
        np.testing.assert_allclose(ImageReader(3)(image).pixels, pixels(i), atol=1e-6)


def test_documents_and_pictures(folder):
    path = f"{folder}/data.jsonl"
    assert sources.find(path) is JsonlDocuments
    source = JsonlDocuments(path)
    holds(source)
    (folder / "data.jsonl").write_text('[{"image": "none.png"}]')
    refused(DocumentError, ImageReader(3), JsonlDocuments(path)[0][0], saying=("none.png", "does not exist"))
    refused(DocumentError, JsonlDocuments, f"{folder}/none.jsonl", saying=("none.jsonl",))
    refused(UserError, sources.find, f"{folder}/nothing", saying=("nothing", "names no source"))


def test_shards(folder, tmp_path):
    out = folder / "shards"
    reader, how = SourceReader(JsonlDocuments(f"{folder}/data.jsonl")), Encoding(source="a", shards=3)
    assert encode(reader, out, how, 1, 2) is None
    encode(reader, out, how, 0, 2)
    assert sources.find(str(out)) is EncodedDocuments
    if str(folder).startswith("s3://"):
        refused(UserError, EncodedDocuments, str(out), saying=("cache",))
        holds(EncodedDocuments(str(out), EncodedOptions(cache=str(tmp_path))))
        kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
        assert kept == [f"{i:05d}-of-00003.array_record" for i in range(3)]
    else:
        holds(EncodedDocuments(str(out)))


def test_parquet(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [png(i) for i in range(3)], "text": ["a", "b", "c"]}), tmp_path / "a")
    (folder / "parquet" / "a.parquet").write_bytes((tmp_path / "a").read_bytes())
    for path in (f"{folder}/parquet", f"{folder}/parquet/a.parquet", f"{folder}/parquet/*.parquet"):
        found = list(ParquetReader(path, RowOptions()).read(0, 3))
        assert [f.draft[0].texts for f in found] == [("a",), ("b",), ("c",)]


def test_a_bucket_without_its_package(monkeypatch):
    monkeypatch.setattr(images, "_installed", lambda package: False)
    for scheme, extra in (("gs", "[gcs]"), ("s3", "[s3]")):
        refused(UserError, JsonlDocuments, f"{scheme}://bucket/data.jsonl", saying=("install", extra))
