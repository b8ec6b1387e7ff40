"""`starflow2 data`: its numbers are those of the documents, and its page marks what is predicted."""

import json
import re

import numpy as np
import tiny

from starflow2_jax import cli
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import RowEncoder
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.evaluation import data_report
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES


class Rows:
    """Document i is i % 3 words to predict, then an image to generate; every fourth cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i % 4 == 3:
            raise DocumentError(f"row {i} is <broken>")
        return [Text(" nine" * (1 + i % 3), predict=True), Image(tiny.pixels(i), generate=True)]


def parts():
    streams = [
        Stream(name, weight, Rows(), Preparation(SourceConfig(path=name), ImageReader(1)), seed)
        for name, weight, seed in (("a", 3.0, 1), ("b", 1.0, 2))
    ]
    return streams, RowEncoder(tiny.encoder(), Shape(2, 48, 3, 16))


def test_the_numbers_are_those_of_the_documents():
    streams, encode = parts()
    found = data_report.look(streams, encode, 64)
    numbers = data_report.summary(streams, found, encode)
    assert numbers["read"] == 64 and [numbers["sources"][n]["read"] for n in "ab"] == [48, 16]
    a = numbers["sources"]["a"]
    assert a["documents"] == 8 and a["weight"] == 0.75 and a["skipped"]["document"]["count"] == 12
    assert "row" in a["skipped"]["document"]["first"]
    words = {i: len(tiny.tokenizer().encode(" nine" * (1 + i % 3))) for i in range(8) if i % 4 != 3}
    each = [words[i] + 2 + 6 + 1 for i in words]  # six whole epochs: words, two marks, the image's tokens, the end
    assert a["positions"]["least"] == min(each) and a["positions"]["most"] == max(each)
    assert a["positions"]["median"] == np.median(each)
    assert a["generated images"] == a["flow images"] == 1
    assert np.isclose(a["predicted tokens"], np.mean([words[i] + 3 for i in words]))
    assert 0.5 < numbers["rows"]["filled"] <= 1 and numbers["rows"]["documents"] > 1


def test_the_page_marks_what_is_predicted():
    streams, encode = parts()
    found = data_report.look(streams, encode, 12)
    numbers = data_report.summary(streams, found, encode)
    page = data_report.page(STAGES["joint"], numbers, found, tiny.tokenizer(), tiny.CODEC)
    assert "<h1>What stage joint sees</h1>" in page and "&lt;broken&gt;" in page and "<broken>" not in page
    examples = re.findall(r'<div class="example">(.*?)</div>', page)
    assert len(examples) == sum(each.features is not None for each in found)
    assert all(example.count('class="pixels made"') == 1 for example in examples)
    assert all(example.count('<span class="token made">') >= 4 for example in examples)
    unframed = data_report.page(STAGES["image_to_text"], numbers, found, tiny.tokenizer(), tiny.CODEC)
    assert 'class="pixels made"' not in unframed and unframed.count("token made") == page.count("token made")
    assert "token made" not in data_report.page(STAGES["text_to_image"], numbers, found, tiny.tokenizer(), tiny.CODEC)


def test_the_command(tmp_path, capsys):
    numbers, page = tmp_path / "numbers.json", tmp_path / "pages/page.html"
    given = ["--config", "digits_quick", "--runlocal", "--stage", "image_to_text", "--num", "30"]
    assert cli.main(["data", *given, "--config.cpu_devices=8", "--json", str(numbers), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "30 documents read" in said and "read: 20 read, 66.7% (weight 66.7%) of endless" in said
    assert set(json.loads(numbers.read_text())["sources"]) == {"read", "sum"}
    assert page.read_text().count('<div class="example">') == 30
    assert cli.main(["data", *given, "--stage", "jiont", "--config.cpu_devices=8"]) == 2
