"""JSON records, one per line or in one array: found by a sparse index, read one by one, refused with a sentence."""

import json
import tracemalloc

import pytest
import tiny
from refused import refused

from starflow2_jax.data import jsonl, sources
from starflow2_jax.data.documents import DocumentError, Speaker, StoredImage, Text, Wordings
from starflow2_jax.data.images import ImageReader, write_image
from starflow2_jax.data.jsonl import APART, JsonlDocuments, JsonlOptions

COUNT = 3 * APART + 5


def conversation(i: int) -> dict:
    """With brackets, quotes, backslashes and letters of several bytes in its texts."""
    said = f'[{{"zebra\\ {i}": ß漢😀]}},'
    return {"conversations": [{"from": "human", "value": said}, {"from": "gpt", "value": f"answer {i}"}]}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("piece", [64, 2**20])
def test_an_array_of_conversations(tmp_path, monkeypatch, indent, ascii_only, piece):
    monkeypatch.setattr(jsonl, "PIECE", piece)
    values = [conversation(i) for i in range(COUNT)]
    file = tmp_path / "data.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).replace("\n", "\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = sources.find(str(file))(str(file), JsonlOptions())
    assert len(source) == COUNT and len(source.begins) == 4
    for i in (0, 1, APART - 1, APART, COUNT - 1):
        said = [turn["value"] for turn in values[i]["conversations"]]
        assert source[i] == [Speaker("user"), Text(said[0]), Speaker("assistant"), Text(said[1], predict=True)]


def test_records_are_recognised_by_their_shape(tmp_path):
    parts, talk = [{"text": "a"}, {"text": "b", "predict": True}], conversation(0)
    forms = {
        "lines of documents": ("\n".join(map(json.dumps, [parts] * 3)), 3),
        "one line": (json.dumps(parts), 1),
        "array of documents": (json.dumps([parts] * 3), 3),
        "lines of conversations": ("\n".join(map(json.dumps, [talk] * 2)), 2),
        "array of conversations": (json.dumps([talk] * 2), 2),
    }
    for name, (text, count) in forms.items():
        for suffix in ("json", "jsonl"):
            file = tmp_path / f"data.{suffix}"
            file.write_text(text)
            source = JsonlDocuments(str(file))
            assert len(source) == count, name
            wanted = [Text("a"), Text("b", predict=True)] if "conv" not in name else source[0]
            assert all(source[i] == wanted for i in range(count)), name


@pytest.mark.parametrize(
    "text, saying",
    [
        ('[{"messages": []}, {"messages": []', ("record 1 of the array", "cut off", "byte 19")),
        ('[{"messages": []} {"messages": []}]', ("record 0", '"," or "]"', "byte 17")),
        ('[{"messages": []}, {"messages": nil}]', ("record 1", "byte 19", "Expecting value")),
        ('[{"messages": []}, {"messages": "a\0b"}]', ("record 1", "control character")),
        ('[{"messages": []},', ("record 0", "not closed")),
        ('[{"messages": []}', ("record 0", "not closed")),
        ('[{"messages": []}, ' + "[" * 100_000, ("record 1", "nested too deeply")),
        ('[{"messages": []}, ' + "9" * 5000 + "]", ("record 1", "thousands of digits")),
    ],
)
def test_broken_arrays(tmp_path, text, saying):
    (tmp_path / "data.json").write_text(text)
    refused(DocumentError, JsonlDocuments, str(tmp_path / "data.json"), saying=("data.json", *saying))


def test_one_broken_record_of_an_array_does_not_hide_the_others(tmp_path):
    talk = json.dumps(conversation(1))
    broken = '{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    (tmp_path / "data.json").write_text(f"[{talk},\n{broken},\n{talk}]")
    source = JsonlDocuments(str(tmp_path / "data.json"))
    assert len(source) == 3 and source[0] == source[2]
    refused(DocumentError, source.__getitem__, 1, saying=("document 1 (line 2)", "lone surrogate"))


def test_a_line_of_100_megabytes_is_refused_and_fills_no_memory(tmp_path):
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.write(b'[{"text": "before"}]\n[{"text": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}]\n[{"text": "after"}]\n')
    tracemalloc.start()
    source = JsonlDocuments(str(tmp_path / "data.jsonl"))
    assert len(source) == 3 and source[0] == [Text("before")] and source[2] == [Text("after")]
    refused(DocumentError, source.__getitem__, 1, saying=("document 1 (line 2)", "16 MiB", "pictures as files"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60 * 2**20


def test_lines_that_a_crash_left_empty(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'[{"text": "a"}]\r\n' + bytes(4096) + b'\n[{"text": "b"}]\r\n')
    source = JsonlDocuments(str(tmp_path / "data.jsonl"))
    assert len(source) == 3 and source[2] == [Text("b")]
    refused(DocumentError, source.__getitem__, 1, saying=("document 1 (line 2)", "not valid JSON"))


def test_paths_of_pictures(tmp_path):
    pictures, file = tmp_path / "pictures", tmp_path / "data.jsonl"
    pictures.mkdir()
    image = write_image(pictures / "a", tiny.pixels(0))
    paths = [
        "a.png",
        str(image),
        f"file://{image}",
        f"file://localhost{image}",
        "https://host.example/a.png",
        "../a.png",
    ]
    file.write_text("\n".join(json.dumps([{"image": path}]) for path in paths))
    source = JsonlDocuments(str(file), JsonlOptions(images=str(pictures)))
    read = [ImageReader(1)(source[i][0]).pixels for i in range(4)]
    assert all((pixels == read[0]).all() for pixels in read)
    refused(DocumentError, source.__getitem__, 4, saying=("data.jsonl", "https://host.example/a.png", "download it"))
    refused(DocumentError, ImageReader(1), source[5][0], saying=("a.png", "does not exist"))
    (pictures / "data.jsonl").write_text(file.read_text())
    beside = JsonlDocuments(f"file://{pictures / 'data.jsonl'}")[0][0]
    assert isinstance(beside, StoredImage) and (ImageReader(1)(beside).pixels == read[0]).all()
    refused(DocumentError, JsonlDocuments, "http://host.example/data.jsonl", saying=("the file is the address",))


def test_documents_of_images_or_of_texts_alone(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '[{"image": "a.png", "generate": true}]\n[{"text": ["a", "b"], "predict": true}]'
    )
    image, words = (JsonlDocuments(str(tmp_path / "data.jsonl"))[i] for i in range(2))
    assert len(image) == 1 and image[0].generate
    assert words == [Wordings(("a", "b"), predict=True)]
