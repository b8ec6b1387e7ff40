"""Documents and the images in them: what is read as it was meant, and what is refused."""

import json
import struct

import numpy as np
import pytest
import tiny
import tiny_experiment
from etils import epath
from PIL import Image as Pillow
from PIL import ImageOps
from refused import refused

from starflow2_jax.data.documents import Document, DocumentError, Image, LengthError, Text
from starflow2_jax.data.images import ImageReader, read_image, write_image
from starflow2_jax.data.json_documents import finished, from_json, read_document
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.pipeline import RowEncoder, collate
from starflow2_jax.models.kernels import most_documents
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES
from starflow2_jax.training.program import batch_shape


def read(parts, folder) -> Document:
    return finished(from_json(parts, epath.Path(folder)), ImageReader(1))


def test_images(tmp_path):
    refused(DocumentError, read_image, tmp_path / "none.png", 1, saying=("none.png", "does not exist"))
    (tmp_path / "text.png").write_text("no image")
    refused(DocumentError, read_image, tmp_path / "text.png", 1, saying=("text.png", "cannot be read"))
    Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    refused(DocumentError, read_image, tmp_path / "cut.png", 1, saying=("cut.png", "cannot be read"))
    refused(DocumentError, read_image, tmp_path, 1, saying=("cannot be read",))


def test_images_of_16_bits_are_scaled_and_of_32_refused(tmp_path):
    levels = np.arange(0, 256, 4, dtype=np.uint16).reshape(8, 8)
    Pillow.fromarray(levels * 257).save(tmp_path / "deep.png")  # 65535 is white
    assert Pillow.open(tmp_path / "deep.png").mode.startswith("I;16")
    for channels in (1, 3):
        wanted = np.repeat(levels[..., None] / np.float32(127.5) - 1, channels, axis=2)
        np.testing.assert_allclose(read_image(tmp_path / "deep.png", channels), wanted, atol=1e-6)
    for dtype in (np.int32, np.float32):
        Pillow.fromarray(levels.astype(dtype)).save(tmp_path / "wide.tiff")
        refused(DocumentError, read_image, tmp_path / "wide.tiff", 1, saying=("wide.tiff", "32 bits"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_read_as_the_camera_was_held(tmp_path, orientation):
    """Also where another tag is damaged: here a maker that is no text."""
    photo = Pillow.fromarray(np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8))
    tags = struct.pack(">HHLHH", 0x0112, 3, 1, orientation, 0), struct.pack(">HHLL", 0x010F, 5, 1, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">LH", 8, len(tags)) + b"".join(tags) + bytes(4)
    photo.save(tmp_path / "photo.png", exif=exif)
    good = photo.getexif()
    good[0x0112] = orientation
    photo.save(tmp_path / "good.png", exif=good)
    photo.save(tmp_path / "good.tiff", exif=good, compression="tiff_lzw")
    turned = np.asarray(ImageOps.exif_transpose(Pillow.open(tmp_path / "good.png")), np.float32)[..., None] / 127.5 - 1
    for name in ("photo.png", "good.tiff"):
        np.testing.assert_allclose(read_image(tmp_path / name, 1), turned, atol=1e-6)


def test_images_survive_their_files(tmp_path):
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.float32) / 127.5 - 1
        write_image(tmp_path / "image.png", pixels)
        np.testing.assert_allclose(read_image(tmp_path / "image.png", channels), pixels, atol=1e-6)


@pytest.mark.parametrize(
    "parts, saying",
    [
        ({}, ("non-empty list",)),
        ([], ("non-empty list",)),
        (["draw"], ("part 0", "neither")),
        ([{"text": "a"}, {"txet": "b"}], ("part 1", "neither")),
        ([{"text": "a"}, {"video": "film.mp4"}], ("part 1", "a video", "frames as images")),
        ([{"text": 3}], ("part 0", "'text'")),
        ([{"text": "a", "predict": "yes"}], ("part 0", "'predict'")),
        ([{"text": "a", "generate": True}], ("part 0", "'generate'", "text part")),
        ([{"image": None}], ("part 0", "'image'")),
        ([{"image": "x.png", "via": "eye"}], ("part 0", '"via"', "'eye'")),
        ([{"image": "x.png"}], ("part 0", "x.png", "does not exist")),
        ([{"text": "a", "predict": 1}], ("part 0", "'predict' must be true or false")),
        ([{"text": "a", "k" * 9000: 1}], ("part 0", "has the key 'kkk", "text, predict")),
        ([{"image": "x.png", "via": "v" * 9000}], ("part 0", '"via"', "'vvv")),
        (
            [{"text": "a"}, {"image": "data:image/png;base64," + "A" * 9000}],
            ("part 1", "a data: URL", "save it as a file"),
        ),
        ([{"image": "https://host.example/a/b.png"}], ("part 0", "https://host.example/a/b.png", "download it")),
        ([{"image": "A" * 9000}], ("part 0", "AAA", "cannot be read")),
        ([{"image": "a\0b.png"}], ("part 0", "a\\x00b.png", "cannot be read")),
        ([{"image": ""}], ("part 0", "cannot be read")),
    ],
)
def test_parts_of_a_document(tmp_path, parts, saying):
    refused(DocumentError, read, parts, tmp_path, saying=saying)
    (tmp_path / "data.jsonl").write_text('[{"text": "fine"}]\n\n' + json.dumps(parts) + "\n")
    source = JsonlDocuments(tmp_path / "data.jsonl")
    assert len(source) == 2 and source[0] == [Text("fine")]
    refused(DocumentError, source.read, 1, ImageReader(1), saying=("data.jsonl, document 1", *saying))


def test_files_of_documents(tmp_path):
    refused(DocumentError, read_document, tmp_path / "none.json", 1, saying=("none.json",))
    (tmp_path / "broken.json").write_text('[{"text": "a"')
    refused(DocumentError, read_document, tmp_path / "broken.json", 1, saying=("broken.json", "not valid JSON"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    refused(DocumentError, read_document, tmp_path / "binary.json", 1, saying=("binary.json",))
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(DocumentError, JsonlDocuments, tmp_path / "empty.jsonl", saying=("has no documents",))
    refused(DocumentError, JsonlDocuments, tmp_path / "none.jsonl", saying=("none.jsonl", "cannot be read"))
    (tmp_path / "mixed.jsonl").write_bytes(
        '[{"text": "Grüße"}]\r\n  \n'.encode() + b'[{"text": "\xff"}]\n[{"text": "b"}]'
    )
    mixed = JsonlDocuments(tmp_path / "mixed.jsonl")
    assert len(mixed) == 3 and mixed[0] == [Text("Grüße")] and mixed[2] == [Text("b")]
    refused(DocumentError, mixed.__getitem__, 1, saying=("mixed.jsonl, document 1", "cannot be read as text"))


def test_files_that_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf[{"text": "a"}]\r\n\r\n[{"text": "b"}]\r\n')
    source = JsonlDocuments(tmp_path / "data.jsonl")
    assert [source[i] for i in range(len(source))] == [[Text("a")], [Text("b")]]
    (tmp_path / "blank.jsonl").write_bytes(b'\xef\xbb\xbf\n[{"text": "a"}]')
    assert len(JsonlDocuments(tmp_path / "blank.jsonl")) == 1
    (tmp_path / "data.json").write_bytes(b'\xef\xbb\xbf[{"text": "a"}]')
    assert read_document(tmp_path / "data.json", ImageReader(1)) == [Text("a")]


@pytest.mark.parametrize(
    "line, saying",
    [
        ('[{"text": "\\ud83d"}]', (r"half of a character", r"\ud83d", "column 12")),
        ("[" * 100_000 + "]" * 100_000, ("nested too deeply",)),
        ('[{"text": "a", "predict": ' + "9" * 5000 + "}]", ("a number with thousands of digits",)),
        ('[{"text": "a",}]', ("not valid JSON", "column 15")),
    ],
)
def test_odd_lines_are_refused_by_their_place(tmp_path, line, saying):
    (tmp_path / "data.jsonl").write_text('[{"text": "fine"}]\n\n' + line + "\n", encoding="utf-8")
    source = JsonlDocuments(tmp_path / "data.jsonl")
    refused(DocumentError, source.__getitem__, 1, saying=("data.jsonl, document 1 (line 3)", *saying))
    (tmp_path / "data.json").write_text("\n" + line, encoding="utf-8")
    refused(DocumentError, read_document, tmp_path / "data.json", 1, saying=("data.json", *saying))


def test_images_are_files(tmp_path):
    for path in ("https://host.example/a.png", "data:image/png;base64," + "A" * 9000):
        refused(DocumentError, read_image, path, 1, saying=("path",))


def test_documents_that_do_not_fit_the_model():
    seeing, blind = tiny.encoder(), tiny.encoder(vision=False)
    wrong = [Image(tiny.pixels(0, (8, 8)))]
    refused(DocumentError, blind, wrong, saying=("8x8x1", "4x6x1"))
    refused(DocumentError, blind, [Image(tiny.pixels(0), via="vit")], saying=("no vision tower",))
    dreamt = [Image(tiny.pixels(0, (8, 8)), generate=True, via="vit")]
    refused(DocumentError, seeing, dreamt, saying=("vit", "generated"))
    latents = Image(np.zeros((4, 4, 16), np.float32), via="vit")
    refused(DocumentError, seeing, [latents], saying=("pixels of 1 or 3 channels", "not 16"))
    refused(DocumentError, seeing, [Image(tiny.pixels(0, (1, 201)), via="vit")], saying=("1x201", "200 times"))


@pytest.mark.parametrize("start", [False, True])
def test_the_start_of_a_shown_image_is_predicted_where_it_counts(start):
    encode = tiny.encoder()
    features = encode([Text("a", True), Image(tiny.pixels(0, (8, 8)), via="vit", start=start)])
    edges = [encode.ids.vision_start, encode.ids.vision_end, encode.ids.end]
    weights = features["text_weight"][np.isin(features["tokens"], edges)]
    assert weights.tolist() == [start] * 3


@pytest.mark.parametrize(
    "document, saying",
    [
        ([Text("x " * 60)], ("tokens", "40")),
        ([Image(tiny.pixels(i)) for i in range(3)], ("3 latents", "2")),
        ([Image(tiny.pixels(0, (8, 12)), via="vit")], ("24 patches", "16")),
    ],
)
def test_documents_too_long_for_a_row(document, saying):
    shape = Shape(1, 40, 2, 16)
    refused(DocumentError, collate, [tiny.encoder()(document)], shape, saying=saying)
    refused(LengthError, RowEncoder(tiny.encoder(), shape), document, saying=saying)


def test_images_for_the_vision_tower_where_a_stage_has_no_room_for_them():
    seen, saying = (
        [Image(tiny.pixels(0, (4, 4)), via="vit")],
        ("needs 4 patches", "holds 0", "raise stages.NAME.patches"),
    )
    refused(LengthError, RowEncoder(tiny.encoder(), Shape(1, 40, 2)), seen, saying=saying)


def test_a_row_holds_at_most_so_many_documents():
    short = [[Text("a seven", predict=True)]] * 8

    def most(documents: int) -> int:
        rows = next(tiny.batches(short, tiny.encoder(), Shape(2, 64, 2, documents=documents)))
        return int(rows.segments.max())

    assert most(0) > 3 and most(3) == 3


def test_packed_cudnn_bounds_the_documents_of_a_row():
    config = tiny_experiment.get_config()
    assert batch_shape(config, STAGES["joint"]).documents == 0
    config.model.vlm.kernel = "cudnn_packed"
    shape = batch_shape(config, STAGES["joint"])
    assert shape.documents == most_documents(shape.length)
