"""The report: the contents of its page, which needs no other file and no network."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image as Pillow

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.evaluation import report as reports
from starflow2_jax.evaluation.protocol import Page
from starflow2_jax.evaluation.report import write_report

AIMS = {"nll": 0.5, "seconds": 600, "read_accuracy": 0.9, "sum_accuracy": 0.8, "never": 1.0}
REPORT = {
    "nll": np.float32(0.75),
    "seconds": 321.0,
    "read_accuracy": 0.95,
    "sum_accuracy": 0.5,
    "steps": 2150,
    "aims": AIMS,
}


@pytest.fixture
def grid():
    return np.random.default_rng(0).uniform(-1, 1, (10, 12, 8, 8, 1)).astype(np.float32)


def page_of(grid, examples=()) -> Page:
    return Page(
        "What <it> is.", "Drawings", "Drawn & shown.", tuple(f"row {i}" for i in range(10)), grid, list(examples)
    )


@pytest.fixture
def page(tmp_path, grid):
    lines = [
        {"step": 1, "stage": "pretrain", "text_loss": 9.0, "loss": 9.0, "grad_norm": 1.0},
        {"step": 1, "stage": "pretrain", "text_loss": 3.0, "loss": 3.0, "grad_norm": 1.0},
        {"step": 2, "stage": "joint", "text_loss": 2.0, "image_loss": 1.0, "loss": 3.0, "grad_norm": 1.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    parts = [Text("a <b> & "), Image(grid[0, 0]), Image(grid[1, 0], generate=True), Text("made", predict=True)]
    write_report(tmp_path, REPORT, page_of(grid, [("mirror", parts)]), tmp_path / "metrics.jsonl")
    return (tmp_path / "index.html").read_text(encoding="utf-8")


def images_of(page: str) -> list[np.ndarray]:
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Pillow.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


def test_the_page_is_self_contained(page):
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert page.count("<img") == 10 * 10 + 2 + 1 == len(images_of(page))


def test_numbers_stand_beside_their_aims(page):
    rows = {re.sub("<[^>]*>", "|", row) for row in re.findall(r"<tr>(.*)</tr>", page)}
    verdict = {row.split("|")[1]: row for row in rows}
    assert "0.75" in verdict["nll"] and "≤ 0.5" in verdict["nll"] and "missed" in verdict["nll"]
    assert "≤ 600" in verdict["seconds"] and "✓ met" in verdict["seconds"]
    assert "≥ 0.9" in verdict["read accuracy"] and "✓ met" in verdict["read accuracy"]
    assert "missed" in verdict["sum accuracy"] and "not measured" in verdict["never"]
    assert "2,150" in verdict["steps"] and "met" not in verdict["steps"]


def test_images_are_the_pixels_and_generated_ones_are_marked(page, grid):
    images = images_of(page)
    want = np.round((grid + 1) * 127.5).astype(np.uint8)[..., 0]
    np.testing.assert_array_equal(images[11], want[1, 1])
    tags = re.findall(r'<img class="(pixels[^"]*)" alt="([^"]*)"', page)
    assert tags[-2:] == [("pixels", "given image"), ("pixels made", "generated image")]
    assert "a &lt;b&gt; &amp; " in page


def test_json_is_the_report(page, tmp_path):
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT


def test_sheet_shows_every_sample_enlarged(page, tmp_path, grid):
    sheet = np.asarray(Pillow.open(tmp_path / "samples.png"))
    side = 8 * 8 + reports.MARGIN
    assert sheet.shape == (10 * side + reports.MARGIN, 12 * side + reports.MARGIN)
    top, left = reports.MARGIN + 3 * side, reports.MARGIN + 11 * side
    want = np.round((grid[3, 11, ..., 0] + 1) * 127.5).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    np.testing.assert_array_equal(sheet[top : top + 64, left : left + 64], want)


def test_curves_take_the_last_run_of_a_step_and_survive_a_cut_line(page, tmp_path):
    curves = reports.read_metrics(tmp_path / "metrics.jsonl")
    assert curves == {
        ("pretrain", "text_loss"): {1: 3.0},
        ("joint", "image_loss"): {2: 1.0},
        ("joint", "text_loss"): {2: 2.0},
    }
    assert len(reports.draw_curves(curves).axes) == 3


def test_without_metrics_the_page_says_so(tmp_path, grid):
    write_report(tmp_path, REPORT, page_of(grid), tmp_path / "none.jsonl")
    assert "No metrics" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_page_says_what_it_shows(page):
    assert "<p>What &lt;it&gt; is.</p>" in page and "<h2>Drawings</h2>" in page and "Drawn &amp; shown." in page
    assert page.count("<th>row ") == 10 and '<span class="made">made</span>' in page


def test_numbers_alone_are_a_report(tmp_path):
    write_report(tmp_path, {"accuracy": 0.5}, None, tmp_path / "none.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "index.html"}
    assert "accuracy" in (tmp_path / "index.html").read_text(encoding="utf-8")
