"""A codec, a source, a benchmark and a stage from outside: one Python file, and not a line of the package changed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.checkpoints.directory import CheckpointDirectory, CheckpointError
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.data.sources import SOURCES
from starflow2_jax.evaluation.protocol import seed_of
from starflow2_jax.evaluation.table import BENCHMARKS
from starflow2_jax.extensions import import_file
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.stages import STAGES

OUTSIDE = str(Path(__file__).parent / "outside" / "squares.py")
TABLES = (CODECS, SOURCES, BENCHMARKS, STAGES)


@pytest.fixture(autouse=True)
def own_rows_alone():
    """What a test adds to the tables goes with it, as with the process of a command."""
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    before = [dict(table) for table in TABLES]
    out = tmp_path_factory.mktemp("outside") / "run"
    assert cli.main(["train", "--config", OUTSIDE, "--out", str(out)]) == 0
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)
    return out


@pytest.fixture
def sides(tmp_path) -> str:
    (tmp_path / "sides.json").write_text("[1, 2, 3]")
    return str(tmp_path / "sides.json")


def test_they_train(trained):
    lines = [json.loads(line) for line in (trained / "metrics/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["stage"] == "deep_alone" and np.isfinite(lines[-1]["image_loss"])
    import_file(OUTSIDE)
    assert CheckpointDirectory(trained).steps.meta(4)["stage"] == "deep_alone"
    source = SOURCES["squares"]("squares", SOURCES["squares"].Options(side=3))
    codec = CheckpointDirectory(trained).codec()
    assert codec.kind == "pca" and (codec.grid, codec.channels) == ((2, 2), 6)
    images = (image.pixels for image in source.images())
    again = CODECS["pca"].make(CODECS["pca"].Options(), images)  # fitted to the source that the config names
    for name, array in again.weights.items():
        np.testing.assert_array_equal(codec.weights[name], array)
    sampler = Sampler.restore(trained)
    assert len(sampler.tokenizer.encode(" square")) == 1  # a word of the source


def test_a_benchmark_of_ones_own(trained, sides, tmp_path, capsys):
    command = ["eval", "--import", OUTSIDE, "--benchmark", "squares", "--data", sides, "--checkpoint", str(trained)]
    assert cli.main([*command, "--batch", "2", "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert 0 <= report["area_error"] < 64 and "area error" in (tmp_path / "report/index.html").read_text()
    lines = [json.loads(x) for x in (tmp_path / "report/answers/samples.jsonl").read_text().splitlines()]
    assert [(x["document"], x["seed"]) for x in lines] == [
        (f"side {side}", seed_of(0, f"side {side}", k)) for side in (1, 2, 3) for k in (0, 1)
    ]
    rows = (tmp_path / "report/answers/squares.csv").read_text().split("\n")  # for its public scorer
    assert [row.split(",")[:2] for row in rows] == [[f"side {side}", k] for side in (1, 2, 3) for k in ("0", "1")]
    [part, *_] = lines[0]["parts"]
    assert Pillow.open(tmp_path / "report/answers" / part["image"]).size == (8, 8)  # a picture, for the codec says so


def test_a_codec_that_is_no_bijection_scores_its_latents(trained, tmp_path, capsys):
    Pillow.new("L", (8, 8), 200).save(tmp_path / "scan.png")
    (tmp_path / "one.json").write_text('[{"text": "a square of side 2"}, {"image": "scan.png", "generate": true}]')
    command = ["score", "--import", OUTSIDE, "--checkpoint", str(trained), "--document", str(tmp_path / "one.json")]
    assert cli.main(command) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["bits_per_dim"] == pytest.approx(score["nats_per_dim"] / np.log(2))  # no levels of 8 bits
    assert score["nats_per_dim"] * 2 * 2 * 6 == pytest.approx(-score["nats"])


def test_a_checkpoint_runs_no_code_that_the_user_has_not_named(trained, tmp_path, capsys, monkeypatch):
    command = [
        "sample",
        "--checkpoint",
        str(trained),
        "--prompt",
        "a",
        "--out",
        str(tmp_path / "s"),
        "--max-tokens",
        "6",
    ]
    assert cli.main(command) == 2
    assert "config.json" in (said := capsys.readouterr().err) and "'pca'" in said and "--import" in said
    import_file(OUTSIDE)
    monkeypatch.delitem(STAGES, "deep_alone")
    assert cli.main(command) == 2
    assert "deep_alone" in (said := capsys.readouterr().err) and "--import" in said
    assert cli.main([*command, "--import", OUTSIDE]) == 0


def test_a_codecs_weights_are_checked(trained, tmp_path):
    import_file(OUTSIDE)
    folder = CheckpointDirectory(tmp_path / "copy")
    original = CheckpointDirectory(trained)
    codec = original.codec()
    folder.create(original.config(), codec, original.tokenizer())
    again = folder.codec()
    jax.tree.map(np.testing.assert_array_equal, dict(again.weights), dict(codec.weights))
    images = np.stack([SOURCES["squares"]("", SOURCES["squares"].Options())[i][1].pixels for i in range(4)])
    np.testing.assert_array_equal(again.decode(again.encode(images)), codec.decode(codec.encode(images)))
    path = tmp_path / "copy/codec.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["basis"][0, 0] += 1e-3
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(CheckpointError, match="codec.safetensors .*content hash"):
        folder.codec()
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="codec.safetensors cannot be read"):
        folder.codec()
    path.unlink()
    with pytest.raises(CheckpointError, match="codec.safetensors cannot be read"):
        folder.codec()
