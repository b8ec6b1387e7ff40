"""Files that the formats' own libraries write are read back equal; damaged ones lose what is damaged, and nothing
else.
"""

import csv
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from picture_files import pixels, png
from refused import refused

from starflow2_jax.data.documents import DocumentError, Speaker, Text, Wordings
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.readers import ParquetReader, Reader, TarReader
from starflow2_jax.data.rows import RowOptions
from starflow2_jax.data.tar_index import TarIndexReader
from starflow2_jax.errors import UserError

OPTIONS = RowOptions()


def drafts(reader: Reader, first: int = 0, last: int | None = None) -> list:
    return [found.draft for found in reader.read(first, reader.units if last is None else last)]


def same(draft, captions: tuple[str, ...], *seeds: int) -> bool:
    """Whether a draft is of these captions, and generates the pictures of these seeds."""
    words, *images = draft
    read = [ImageReader(3)(image).pixels for image in images]
    return (
        words == Wordings(captions)
        and all(image.generate for image in images)
        and all(np.allclose(a, pixels(seed), atol=1e-6) for a, seed in zip(read, seeds, strict=True))
    )


def parquet(path, count: int, groups: int = 4, first: int = 0) -> None:
    """BAGEL's form: the bytes of a picture, and its captions as a JSON text."""
    rows = range(first, first + count)
    table = pa.table(
        {
            "image": [png(i) for i in rows],
            "captions": [json.dumps({"short": f"zebra {i}", "long": [f"a zebra {i}"]}) for i in rows],
        }
    )
    pq.write_table(table, path, row_group_size=groups)


def test_parquet(tmp_path):
    parquet(tmp_path / "0.parquet", 10)
    parquet(tmp_path / "1.parquet", 5, first=10)
    reader = ParquetReader(str(tmp_path), OPTIONS)
    assert reader.units == 15
    for first, last in ((0, 15), (3, 11), (9, 10), (10, 15), (4, 4)):
        found = list(reader.read(first, last))
        assert [f.unit for f in found] == list(range(first, last))
        assert all(same(f.draft, (f"zebra {f.unit}", f"a zebra {f.unit}"), f.unit) for f in found)
    assert ParquetReader(str(tmp_path / "*1.parquet"), OPTIONS).units == 5


def test_edits_in_parquet(tmp_path):
    images, said = [png(0), png(1), png(2)], [["make it a zebra", "a zebra"], ["now white"]]
    pq.write_table(pa.table({"image_list": [images], "instruction_list": [said]}), tmp_path / "a.parquet")
    [draft] = drafts(ParquetReader(str(tmp_path / "a.parquet"), OPTIONS))
    assert [type(part).__name__ for part in draft] == [
        "StoredImage",
        "Wordings",
        "StoredImage",
        "Wordings",
        "StoredImage",
    ]
    assert not draft[0].generate and draft[1] == Wordings(("make it a zebra", "a zebra"))
    assert same(draft[1:3], ("make it a zebra", "a zebra"), 1) and same(draft[3:], ("now white",), 2)


def test_a_damaged_row_group_loses_its_rows_alone(tmp_path):
    parquet(tmp_path / "a.parquet", 12)
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + 40] = bytes(40)
    (tmp_path / "a.parquet").write_bytes(content)
    found = list(ParquetReader(str(tmp_path / "a.parquet"), OPTIONS).read(0, 12))
    assert [f.unit for f in found if not isinstance(f.draft, DocumentError)] == [0, 1, 2, 3, 8, 9, 10, 11]
    [fault] = [f for f in found if isinstance(f.draft, DocumentError)]
    assert fault.place.endswith("a.parquet, row 4") and "damaged" in str(fault.draft)


def test_a_parquet_file_without_its_end_is_one_fault(tmp_path):
    for name in "ab":
        parquet(tmp_path / f"{name}.parquet", 3)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    reader = ParquetReader(str(tmp_path), OPTIONS)
    fault, *others = reader.read(0, reader.units)
    assert "cannot be read" in str(fault.draft) and fault.place.endswith("a.parquet")
    assert [same(f.draft, (f"zebra {i}", f"a zebra {i}"), i) for i, f in enumerate(others)] == [True] * 3


def tar(path, count: int) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(count):
            writer.write({"__key__": f"folder/{i:04d}", "png": png(i), "txt": f"zebra {i}", "json": {"width": 8}})


def test_tar(tmp_path):
    tar(tmp_path / "0.tar", 5)
    tar(tmp_path / "1.tar", 3)
    reader = TarReader(str(tmp_path), OPTIONS)
    found = list(reader.read(0, 2))
    assert [f.unit for f in found] == [0] * 5 + [1] * 3
    for i, f in enumerate(found):
        assert same(f.draft, (f"zebra {i % 5}",), i % 5)
    assert len(drafts(reader, 1, 2)) == 3 and found[1].place.endswith("0.tar, sample folder/0001")


def test_conversations_and_captions_of_json_in_tar(tmp_path):
    said = [{"from": "human", "value": "<image>, <image>"}, {"from": "gpt", "value": "two"}]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "0.png": png(0), "1.png": png(1), "json": {"conversations": said}})
        writer.write({"__key__": "b", "jpg": png(2), "json": {"caption": "short", "text": ["long", "longer"]}})
        writer.write({"__key__": "c", "jpg": png(3)})
        writer.write({"__key__": "d", "txt": "no picture"})
        writer.write({"__key__": "e", "json": b"{", "jpg": png(3)})
        writer.write({"__key__": "f", "txt": b"\xff", "jpg": png(3)})
    talk, captioned, *faults = drafts(TarReader(str(tmp_path / "a.tar"), OPTIONS))
    assert [talk[0], talk[2], *talk[4:]] == [
        Speaker("user"),
        Text(", "),
        Speaker("assistant"),
        Text("two", predict=True),
    ]
    assert all(np.allclose(ImageReader(3)(talk[i]).pixels, pixels(seed), atol=1e-6) for i, seed in ((1, 0), (3, 1)))
    assert same(captioned, ("short", "long", "longer"), 2)
    for fault, saying in zip(faults, ("no caption", "no picture", "not valid JSON", "not UTF-8"), strict=True):
        assert isinstance(fault, DocumentError) and saying in str(fault)


def test_classes_in_tar(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, said in enumerate(("1", "0", "2", "red fox")):
            writer.write({"__key__": str(i), "png": png(i), "cls": said})
    options = RowOptions(captions=("cls",), template="a {}")
    one, zero, fault, named = drafts(TarReader(str(tmp_path), options, ["zebra", "red panda"]))
    assert same(one, ("a red panda",), 0) and same(zero, ("a zebra",), 1) and same(named, ("a red fox",), 3)
    assert "2 names of classes" in str(fault)
    assert "--classes" in str(drafts(TarReader(str(tmp_path), options))[0])
    assert "no caption" in str(drafts(TarReader(str(tmp_path), OPTIONS))[0])  # a class that nobody asks for


def write_index(path, *rows: tuple[str, ...]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)


def test_rows_that_name_files_in_tars(tmp_path):
    tar(tmp_path / "0.tar", 5)
    tar(tmp_path / "1.tar", 3)
    rows = [(f"{t}.tar", f"folder/{i:04d}.png", f"zebra {i}\nof {t}") for t, i in ((0, 4), (0, 1), (1, 2), (0, 0))]
    write_index(
        tmp_path / "a.tsv", ("tar", "file", "caption"), *rows, ("1.tar", "none.png", "a"), ("2.tar", "0.png", "a")
    )
    columns = ("tar", "file", "edit_instruction", "edited_file")
    write_index(tmp_path / "b.tsv", columns, ("1.tar", "folder/0000.png", "turn it", "folder/0002.png"))
    reader = TarIndexReader(str(tmp_path), OPTIONS)
    assert reader.units == 6
    found = list(reader.read(0, reader.units))
    assert [f.unit for f in found] == [0, 0, 1, 2, 3, 4, 5]
    for f, seed, t in zip(found, (4, 1, 2, 0), (0, 0, 1, 0), strict=False):
        assert same(f.draft, (f"zebra {seed}\nof {t}",), seed)
    assert "none.png" in str(found[4].draft) and "2.tar" in str(found[5].draft)
    before, words, after = found[6].draft
    assert words == Wordings(("turn it",)) and (before.generate, after.generate) == (False, True)
    assert np.allclose(ImageReader(3)(after).pixels, pixels(2), atol=1e-6)
    assert [f.unit for f in reader.read(1, 3)] == [1, 2] and found[2].place.endswith("a.tsv, row 2")
    write_index(tmp_path / "c.tsv", ("tar", "caption"), ("0.tar", "a"))
    refused(UserError, TarIndexReader, str(tmp_path / "c.tsv"), OPTIONS, saying=("no column file",))


@pytest.mark.parametrize("damage", ["cut", "zeros", "noise"])
def test_a_damaged_tar_keeps_what_comes_before(tmp_path, damage):
    tar(tmp_path / "a.tar", 6)
    tar(tmp_path / "b.tar", 2)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as file:
        third = next(member.offset for member in file if "0003" in member.name)
    if damage == "cut":
        content = content[: third + 700]
    else:
        content[third : third + 512] = bytes(512) if damage == "zeros" else np.random.default_rng(0).bytes(512)
    (tmp_path / "a.tar").write_bytes(content)
    found = list(TarReader(str(tmp_path), OPTIONS).read(0, 2))
    good = [f for f in found if not isinstance(f.draft, DocumentError)]
    assert [f.unit for f in good[-2:]] == [1, 1] and len([f for f in good if f.unit == 0]) == 3
    faults = [f for f in found if isinstance(f.draft, DocumentError)]
    assert len(faults) == 1 and "a.tar" in faults[0].place and "damaged or cut off" in str(faults[0].draft)


def test_paths_without_files(tmp_path):
    for reader in (ParquetReader, TarReader, TarIndexReader):
        for path in (tmp_path, tmp_path / "none", tmp_path / "*.x"):
            refused(UserError, reader, str(path), OPTIONS, saying=("give a file, a folder",))


def test_columns(tmp_path):
    table = pa.table({"picture": [png(0)], "alt": ["zebra"], "none": [None]})
    pq.write_table(table, tmp_path / "a.parquet")
    for options, saying in (
        (RowOptions(image="picture", captions=("alt", "absent", "none")), None),
        (RowOptions(), "no picture 'image'; it has 'picture, alt, none'"),
        (RowOptions(image="picture"), "no caption 'caption' or"),
        (RowOptions(image="none"), "no picture"),
        (RowOptions(image="picture", captions=("none",)), "no caption"),
    ):
        [draft] = drafts(ParquetReader(str(tmp_path / "a.parquet"), options))
        assert same(draft, ("zebra",), 0) if saying is None else saying in str(draft)
