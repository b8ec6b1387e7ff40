"""`starflow2 encode`: shards that training reads back, whatever was interrupted and however many processes shared the
work.
"""

import hashlib
import io
import json

import cloudpickle
import numpy as np
import pytest
import tiny
from etils import epath
from picture_files import levels, pixels, png
from PIL import Image as Pillow
from refused import refused

from starflow2_jax.data import encoding
from starflow2_jax.data.documents import DocumentError, Image, Speaker, StoredImage, Text, Wordings
from starflow2_jax.data.encoded import EncodedDocuments
from starflow2_jax.data.encoding import Encoding, encode
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.data.readers import Found
from starflow2_jax.data.records import pack, unpack
from starflow2_jax.errors import UserError


class Drafts:
    """A reader of a list; of faults where it holds them."""

    def __init__(self, drafts: list):
        self.drafts, self.units = drafts, len(drafts)

    def read(self, first: int, last: int):
        return (Found(i, f"document {i}", self.drafts[i]) for i in range(first, last))


def file(content: bytes, generate: bool = True, via: str = "flow") -> StoredImage:
    return StoredImage("a file", lambda: io.BytesIO(content), generate, via)


def captioned(i: int, size: tuple[int, int] = (6, 8)) -> list:
    return [Wordings((f"zebra {i}", f"a zebra {i}"), weights=(1.0, 2.0)), file(png(i, size))]


def talk(i: int, words: str = "a zebra") -> list:
    return [Speaker("user"), file(png(i), False, "vit"), Text("what?"), Speaker("assistant"), Text(words, predict=True)]


def out(folder, drafts: list, **options):
    values = {"source": "list:", "shards": 3} | options
    index = encode(Drafts(drafts), epath.Path(folder), Encoding(**values))
    return index, EncodedDocuments(str(folder))


def contents(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_record_holds_a_draft():
    draft = [*talk(0), *captioned(1), Text("ß", predict=False), Wordings(("a",), True)]
    back = unpack(pack(draft), "here", (0, 0, 0))
    for part, other in zip(draft, back, strict=True):
        if isinstance(part, StoredImage):
            assert (other.open().read(), other.generate, other.via) == (part.open().read(), part.generate, part.via)
        else:
            assert part == other


@pytest.mark.parametrize(
    "damage", [b"", b"\1", b"\xff" * 9, b"\2\0\0\0[]rest", b'\x0e\0\0\0[{"file": 10}]', b"\4\0\0\0null"]
)
def test_a_damaged_record_is_refused(damage):
    refused(DocumentError, unpack, damage, "shard 3, record 4", (1, 1, 1), saying=("shard 3, record 4", "damaged"))


def test_documents_are_read_back(tmp_path):
    drafts = [*(captioned(i) for i in range(150)), talk(200), [Text("words", predict=True)], [file(png(201))]]
    index, source = out(tmp_path, drafts)
    assert index["documents"] == len(source) == 153 and index["latents"] is None and source.codec() is None
    again = cloudpickle.loads(cloudpickle.dumps(source))
    for i in (0, 1, 50, 51, 149):
        words, image = again[i]
        assert words == captioned(i)[0] and image.generate
        assert np.allclose(ImageReader(3)(image).pixels, pixels(i), atol=1e-6)
        assert image.open().read() == png(i)
    assert [type(part) for part in source[150]] == [type(part) for part in talk(0)] and source[150][1].via == "vit"
    assert source[151] == [Text("words", predict=True)] and len(source[152]) == 1


def test_large_pictures_are_scaled_down(tmp_path):
    tall = np.zeros((100, 40, 3), np.uint8)
    tall[50:] = 255
    content = io.BytesIO()
    Pillow.fromarray(tall).save(content, "PNG")
    _, source = out(tmp_path, [[file(content.getvalue())], [file(png(0))]], shards=1, size=20)
    picture = Pillow.open(source[0][0].open())
    assert picture.format == "JPEG" and picture.size == (20, 50)
    np.testing.assert_allclose(np.asarray(picture)[[0, 20, 30, 49]].mean((1, 2)), [0, 0, 255, 255], atol=8)
    assert source[1][0].open().read() == png(0)


def test_duplicates_are_passed_over(tmp_path):
    """By pixels, whatever the file and the words; but a conversation about the same picture is another document."""
    bitmap = io.BytesIO()
    Pillow.fromarray(levels(3)).save(bitmap, "BMP")
    other = [Text("other words"), file(bitmap.getvalue())]
    drafts = [
        *map(captioned, range(5)),
        other,
        captioned(0),
        captioned(5),
        talk(0),
        talk(0, "no"),
        talk(0),
        captioned(6),
    ]
    index, source = out(tmp_path, drafts)
    assert (index["documents"], index["duplicates"]) == (9, 3) and len(source) == 9
    said = [part.texts[0] if isinstance(part := source[i][0], Wordings) else source[i][-1].text for i in range(9)]
    assert said == [*(f"zebra {i}" for i in range(6)), "a zebra", "no", "zebra 6"]


def test_what_cannot_be_read_is_listed(tmp_path):
    cut = [file(png(0)[:60])]
    drafts = [captioned(0), cut, DocumentError("no words"), captioned(1), [Text("a"), cut[0]], captioned(2)]
    index, source = out(tmp_path, drafts)
    assert index["skipped"] == {"document": 1, "image": 2} and len(source) == 3
    first, second, third = (tmp_path / "skipped.txt").read_text().splitlines()
    assert first.startswith("document 1: part 0") and second == "document 2: no words"
    assert third.startswith("document 4: part 1 of the document") and "cannot be read" in third


def test_several_processes_write_what_one_writes(tmp_path):
    drafts = [*map(captioned, range(70)), [file(b"")], *map(captioned, range(20))]
    reader = Drafts(drafts)
    encode(reader, epath.Path(tmp_path / "one"), Encoding(source="a", shards=7))
    for process in (2, 0, 1):
        done = encode(reader, epath.Path(tmp_path / "three"), Encoding(source="a", shards=7), process, 3)
        assert (done is None) == (process != 1)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert encode(reader, epath.Path(tmp_path / "three"), Encoding(source="a", shards=7), 0, 3) == done


class Cut(Exception):
    pass


def test_it_may_be_stopped_anywhere_and_started_again(tmp_path, monkeypatch):
    """Every write and every rename in turn fails, as if the process had been killed there."""
    reader, how = Drafts([*map(captioned, range(9)), *map(captioned, range(3))]), Encoding(source="a", shards=3)
    encode(reader, epath.Path(tmp_path / "whole"), how)
    publish, left, stopped = encoding._publish, 0, []

    def cut(folder, name, content):
        nonlocal left
        left -= 1
        if left == 0:
            (folder / f".{name}.partial").write_bytes(content[: len(content) // 2])
            raise Cut
        publish(folder, name, content)

    monkeypatch.setattr(encoding, "_publish", cut)
    for left in range(1, 11):
        folder = tmp_path / f"{left}"
        try:
            encode(reader, epath.Path(folder), how)
        except Cut:
            stopped.append(folder)
            assert not (folder / "index.json").exists()
            encode(reader, epath.Path(folder), how)
        assert contents(folder) == contents(tmp_path / "whole")
    assert len(stopped) == 9  # two files for each shard, and three at the end


@pytest.mark.parametrize("content", [b"", b'{"enc', b"\0" * 99])
def test_a_shard_whose_report_is_damaged_is_written_anew(tmp_path, content):
    drafts = [captioned(i) for i in range(6)]
    out(tmp_path, drafts)
    whole = contents(tmp_path)
    (tmp_path / "00001-of-00003.json").write_bytes(content)
    out(tmp_path, drafts)
    assert contents(tmp_path) == whole


def test_other_options_do_not_mix(tmp_path):
    reader, folder = Drafts(list(map(captioned, range(9)))), epath.Path(tmp_path)
    encode(reader, folder, Encoding(source="a", shards=3), 0, 2)
    for how, saying in (
        (Encoding(source="b", shards=3), ("source 'a', not 'b'",)),
        (Encoding(source="a", shards=3, size=64), ("size 0, not 64",)),
        (Encoding(source="a", shards=3, codec=tiny.CODEC), ("codec None",)),
        (Encoding(source="a", shards=4), ("another number of shards",)),
        (Encoding(source="a", shards=10), ("from 1 to 9", "not 10")),
    ):
        refused(UserError, encode, reader, folder, how, saying=saying)
    refused(UserError, EncodedDocuments, str(tmp_path), saying=("index.json does not exist", "all shards are done"))


def test_latents_are_those_of_the_codec(tmp_path):
    """In bfloat16; an image for the vision tower stays a picture."""
    drafts = [captioned(i, (9, 13)) for i in range(70)] + [[*talk(0), *captioned(80, (4, 6))]]
    index, source = out(tmp_path, drafts, codec=tiny.CODEC)
    reader = ImageReader(1, tiny.SIZE)
    wanted = []
    for i in range(70):
        words, image = source[i]
        latents = tiny.CODEC.encode(reader(drafts[i][1]).pixels[None])[0]
        wanted.append(latents)
        assert isinstance(image, Image) and image.encoded and image.generate and words == drafts[i][0]
        np.testing.assert_allclose(image.pixels, latents, rtol=2**-8)
    assert isinstance(source[70][1], StoredImage) and source[70][1].open().read() == png(0)
    wanted.append(source[70][-1].pixels)
    flat = np.array(wanted).reshape(-1, tiny.CHANNELS)
    found = index["latents"]
    assert (found["grid"], found["channels"]) == (list(tiny.GRID), tiny.CHANNELS)
    np.testing.assert_allclose(found["mean"], flat.mean(0), atol=1e-3)
    np.testing.assert_allclose(found["deviation"], flat.std(0), atol=1e-3)
    assert source.codec() == tiny.CODEC


def test_latents_are_used_as_they_are_or_not_at_all():
    latents = tiny.CODEC.encode(tiny.pixels(0)[None])[0]
    image = Image(latents, generate=True, encoded=True)
    encoder = tiny.encoder()
    for given in ([Text("a"), image], [Text("a"), Image(tiny.pixels(0), generate=True)]):
        np.testing.assert_array_equal(encoder(given)["latents"], latents.reshape(1, -1, tiny.CHANNELS))
    refused(DocumentError, encoder, [Image(latents[:1], encoded=True)], saying=("(1, 3, 4)", "(2, 3, 4)"))
    refused(DocumentError, encoder, [Image(latents, via="vit", encoded=True)], saying=("--via vit",))
    for options in ({"flip": True}, {"crop": "random"}):
        prepare = Preparation(SourceConfig(path="", **options), ImageReader(1))
        refused(DocumentError, prepare, [image], np.random.default_rng(0), saying=("flip", "crop"))


def test_a_damaged_shard_spoils_its_own_documents_alone(tmp_path):
    index, source = out(tmp_path, list(map(captioned, range(30))))
    name = tmp_path / index["shards"][1]["file"]
    content = bytearray(name.read_bytes())
    middle = content.find(b"zebra 15")
    content[middle : middle + 20] = bytes(20)
    name.write_bytes(content)
    faults = [i for i in range(30) if isinstance(read(source, i), DocumentError)]
    assert faults == [15]
    name.write_bytes(content[: len(content) // 2])
    fresh = EncodedDocuments(str(tmp_path))
    faults = [i for i in range(30) if isinstance(read(fresh, i), DocumentError)]
    assert set(faults) <= set(range(10, 20)) and "00001-of-00003.array_record" in str(read(fresh, 19))
    name.unlink()
    assert "cannot be read" in str(read(EncodedDocuments(str(tmp_path)), 10))


def read(source, i: int):
    try:
        return source[i]
    except DocumentError as error:
        return error


def test_a_damaged_index_is_refused(tmp_path):
    out(tmp_path, [captioned(0)], shards=1)
    index = json.loads((tmp_path / "index.json").read_text())
    for text, saying in (
        ("{", "cannot be read"),
        (json.dumps(index | {"format": 9}), "format 9"),
        (json.dumps({"format": 1}), "'shards'"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"format": %s}' % ("9" * 5000), "cannot be read"),
        ("\ud83d", "cannot be read"),
    ):
        (tmp_path / "index.json").write_bytes(text.encode(errors="surrogatepass"))
        refused(UserError, EncodedDocuments, str(tmp_path), saying=("index.json", saying))
