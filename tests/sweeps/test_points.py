"""Sweeps: points, checks, interruption, launchers, table and plot. Trainings are stand-ins, but for the last test."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.checkpoints.lock import Lock
from starflow2_jax.config import loading as config
from starflow2_jax.sweeps import points, report

ROOT = Path(__file__).parents[2]
SWEEP = f"""
from starflow2_jax.sweeps.points import grid
CONFIG = "{ROOT}/starflow2_jax/experiments/digits_quick.py"
METRIC = "pretrain/loss"
ALWAYS = {{"order": ("pretrain",), "stages.pretrain.steps": 8}}
def points():
    return grid({{"stages.pretrain.optimizer.learning_rate": (1e-4, 1e-2), "stages.pretrain.text_weight": (1.0, 2.0)}})
"""
# Trains as `starflow2 train` does, as far as a sweep can see: metrics, a complete last step, its own story in a file.
TRAINER = """
import json, os, pathlib, signal, sys
out, folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), pathlib.Path(sys.argv[1])
rate, weight = (float(next(a for a in sys.argv if name in a).split("=")[1]) for name in ("learning_rate", "text_weight"))
def tell(what):
    with open(folder / "story", "a") as f:
        f.write(f"{rate} {weight} {what}\\n")
def stop(*_):
    tell("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
resumed = (out / "config.json").exists()
tell("resumed" if resumed else "begun")
(out / "metrics").mkdir(parents=True, exist_ok=True)
(out / "config.json").write_text("{}")
if rate == 1e-2 and not resumed:
    if weight == 1.0 and (folder / "pipe").exists():
        (folder / "pipe").write_text("training")
        signal.pause()
    if weight == 2.0 and not (folder / "mended").exists():
        sys.exit("the loss is nan")
lines = [dict(stage="pretrain", step=s, loss=rate * weight * k) for s, k in ((2, 50), (4, 1), (6, 2), (8, 3))]
(out / "metrics/metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "steps/8").mkdir(parents=True)
"""
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have ignored it
from starflow2_jax.sweeps import points
sweep = points.load(sys.argv[1], sys.argv[2])
points.run(sweep, lambda p: [sys.executable, sys.argv[3], *sys.argv[4:], *points.train_command(sweep, p)])
"""


@pytest.fixture
def files(tmp_path):
    """A sweep file and a stand-in trainer in tmp_path."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    (tmp_path / "trainer.py").write_text(TRAINER)
    return tmp_path


def stand_in(folder: Path, sweep: points.Sweep):
    return lambda p: [sys.executable, str(folder / "trainer.py"), str(folder), *points.train_command(sweep, p)]


def test_grid_and_random():
    assert list(points.grid({"a": (1, 2), "b": "xy"})) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    draws = {"rate": points.log_uniform(1e-4, 1e-1), "drop": points.uniform(0, 0.5), "name": points.choice(("a", "b"))}
    drawn = list(points.random(draws, 300, seed=3))
    assert drawn[:40] == list(points.random(draws, 40, seed=3)) != list(points.random(draws, 40, seed=4))
    rates = np.array([p["rate"] for p in drawn])
    decades = Counter(np.floor(np.log10(rates)).astype(int).tolist())
    assert set(decades) == {-4, -3, -2} and min(decades.values()) > 70
    assert 0 <= min(p["drop"] for p in drawn) and max(p["drop"] for p in drawn) < 0.5
    assert {p["name"] for p in drawn} == {"a", "b"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "starflow2_jax/experiments/sweeps").glob("digits*.py")), ids=lambda p: p.stem
)
def test_the_shipped_sweeps_load_by_name(file, tmp_path):
    sweep = points.load(file.stem, tmp_path)
    assert len(sweep.points) >= 4 and not list(tmp_path.iterdir())
    assert "learning_rate" in sweep.varied.values()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"stages.pretrain.text_weight"', '"stages.pretrain.text_wait"', "did you mean 'stages.pretrain.text_weight'"),
        ("(1.0, 2.0)", "(1.0, 'heavy')", "takes a float"),
        ("(1.0, 2.0)", "(1.0, 1.0)", "a point twice"),
        ("(1.0, 2.0)", "()", "yields no point"),
        ("CONFIG", "EXPERIMENT", "has no CONFIG"),
        ("pretrain/loss", "joint/loss", "with a stage that .* runs"),
        ("digits_quick.py", "digits_quack.py", "there is no experiment file"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(files, old, new, message):
    (files / "sweep.py").write_text(SWEEP.replace(old, new))
    with pytest.raises(config.ConfigError, match=message):
        points.load(files / "sweep.py", files / "out")
    assert not (files / "out").exists()


def test_an_interrupted_sweep_goes_on_and_a_failing_point_does_not_stop_it(files):
    os.mkfifo(files / "pipe")
    command = [sys.executable, "-c", PARENT, files / "sweep.py", files / "out", files / "trainer.py", files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    parent = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (files / "pipe").read_text() == "training"  # the third point is under way
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate()
    assert parent.returncode != 0 and b"KeyboardInterrupt" in errors
    first = ["0.0001 1.0 begun", "0.0001 2.0 begun", "0.01 1.0 begun", "0.01 1.0 saved"]
    assert (files / "story").read_text().splitlines() == first

    sweep, told = points.load(files / "sweep.py", files / "out"), []
    assert [p.state for p in sweep.points] == ["done", "done", "not run", "not run"]
    points.run(sweep, stand_in(files, sweep), told.append)
    assert (files / "story").read_text().splitlines()[4:] == ["0.01 1.0 resumed", "0.01 2.0 begun"]
    assert [p.state for p in sweep.points] == ["done", "done", "done", "failed"]
    assert sweep.points[3].failure == "exit code 1: the loss is nan" and "the loss is nan" in told[-1]

    (files / "mended").touch()
    points.run(sweep, stand_in(files, sweep), told.append)
    assert (files / "story").read_text().splitlines()[6:] == ["0.01 2.0 resumed"]
    assert [p.state for p in sweep.points] == ["done"] * 4


def test_a_sweep_and_another_run_do_not_write_into_one_directory(files, monkeypatch, capsys):
    line = ["sweep", "--sweep", str(files / "sweep.py"), "--out", str(files / "out")]
    with Lock(files / "out").held():  # as `starflow2 train` holds it
        assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert f"writes into {files / 'out'} already" in said and said.count("\n") == 1
    assert not list((files / "out").iterdir())

    def run(*_):
        for other in (
            line,
            ["train", "--config", "digits_quick", "--config.cpu_devices=8", "--out", str(files / "out")],
        ):
            assert cli.main(other) == 2
            assert f"writes into {files / 'out'} already" in capsys.readouterr().err
        ended.append(True)

    ended = []
    monkeypatch.setattr(points, "run", run)
    assert cli.main(line) == 0 and ended


def test_table_and_plot(files, capsys):
    sweep = points.load(files / "sweep.py", files / "out")
    points.run(sweep, stand_in(files, sweep))
    rows = report.write(sweep, files / "out")
    assert [(r["learning_rate"], r["text_weight"]) for r in rows] == [
        (1e-4, 1.0),
        (1e-4, 2.0),
        (1e-2, 1.0),
        (1e-2, 2.0),
    ]
    np.testing.assert_allclose([r["pretrain/loss"] for r in rows[:3]], [2e-4, 4e-4, 2e-2])  # 1, 2, 3 averaged: 2
    assert rows[3]["pretrain/loss"] is None and rows[3]["state"] == "failed: exit code 1: the loss is nan"
    assert json.loads((files / "out/sweep.json").read_text())["points"] == rows
    with (files / "out/sweep.csv").open() as f:
        assert [float(r["pretrain/loss"] or "nan") for r in csv.DictReader(f)][:3] == [
            r["pretrain/loss"] for r in rows[:3]
        ]
    table = (files / "out/sweep.md").read_text().splitlines()
    assert table[0] == "| learning_rate | text_weight | pretrain/loss | state | folder |"
    assert table[2].startswith("| 0.0001 | 1 | 0.0002 | done |")
    with Pillow.open(files / "out/sweep.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert image.width > 2 * image.height and len(colours) > 50


@pytest.mark.parametrize(
    "values, log", [((1e-4, 1e-2), True), ((1, 2, 10), True), ((1, 9), False), ((0.0, 10.0), False), (("a", "b"), False), ((False, True), False)]
)  # fmt: skip
def test_which_axes_are_logarithmic(values, log):
    assert report.spans_decades(values) is log


def test_a_launcher_gets_each_point_once(files, monkeypatch):
    (files / "queue.sh").write_text('#!/bin/bash\nprintf "%q " "$@" >>"$RECORD"; echo >>"$RECORD"; echo job 7\n')
    (files / "queue.sh").chmod(0o755)
    monkeypatch.setenv("RECORD", str(files / "record"))
    template = f"{files}/queue.sh C={{config}} --out {{out}} --name {{name}} {{overrides}} --wrap 'go {{overrides}}'"
    arguments = ["sweep", "--sweep", str(files / "sweep.py"), "--out", str(files / "out"), "--launcher", template]
    assert cli.main(arguments) == 0
    sweep = points.load(files / "sweep.py", files / "out")
    commands = [shlex.split(line) for line in (files / "record").read_text().splitlines()]
    flags = [[f"--config.{a}" for a in p.arguments] for p in sweep.points]
    experiment = ROOT / "starflow2_jax/experiments/digits_quick.py"
    assert commands == [
        [f"C={experiment}", "--out", str(p.run), "--name", f"p{p.folder.name}", *f, "--wrap", f"go {shlex.join(f)}"]
        for p, f in zip(sweep.points, flags, strict=True)
    ]
    assert flags[0][2:] == [
        "--config.stages.pretrain.optimizer.learning_rate=0.0001",
        "--config.stages.pretrain.text_weight=1.0",
    ]
    assert cli.main(arguments) == 0
    assert len((files / "record").read_text().splitlines()) == 4
    assert {p.state for p in sweep.points} == {"handed on"}
    assert cli.main([*arguments, "--again"]) == 0
    assert len((files / "record").read_text().splitlines()) == 4  # they may run: two in one folder spoil it
    point = sweep.points[1]  # a job that ended since
    subprocess.run(stand_in(files, sweep)(point), check=True)
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--again", "all"]) == 0
    assert len((files / "record").read_text().splitlines()) == 7
    assert json.loads((files / "out/sweep.json").read_text())["points"][0]["folder"] == point.folder.name


def test_a_job_that_ended_without_being_done_has_failed_and_is_handed_on_again_when_asked(files, monkeypatch, capsys):
    (files / "queue.sh").write_text('#!/bin/bash\necho "$ENDED" >>"$RECORD"\n')
    (files / "queue.sh").chmod(0o755)
    monkeypatch.setenv("RECORD", str(files / "record"))
    launcher = ["--launcher", f"{files}/queue.sh {{out}}"]
    arguments = ["sweep", "--sweep", str(files / "sweep.py"), "--out", str(files / "out"), *launcher]
    assert cli.main(arguments) == 0
    ended = [Path(line) for line in (files / "record").read_text().splitlines()]
    sweep = points.load(files / "sweep.py", files / "out")
    assert [file.parent for file in ended] == [p.folder for p in sweep.points]
    subprocess.run(stand_in(files, sweep)(sweep.points[0]), check=True)
    for file, code in zip(ended, ("0", "2", "75"), strict=False):  # the fourth one runs, or was killed
        file.write_text(f"{code}\n")
    assert [p.state for p in sweep.points] == ["done", "failed", "failed", "handed on"]
    capsys.readouterr()
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert "2 of 4 points failed; the table says why; correct this and run the same command with --again" in said.err
    assert "failed: its job ended with exit code 75" in said.out
    assert len((files / "record").read_text().splitlines()) == 4
    assert cli.main([*arguments, "--again"]) == 0
    assert (files / "record").read_text().splitlines()[4:] == [str(ended[1]), str(ended[2])]
    assert [p.state for p in sweep.points] == ["done", "handed on", "handed on", "handed on"]


def test_a_launcher_that_fails_is_reported(files, capsys):
    arguments = [
        "sweep",
        "--sweep",
        str(files / "sweep.py"),
        "--out",
        str(files / "out"),
        "--launcher",
        "/missing {out}",
    ]
    assert cli.main(arguments) == 2
    assert "4 of 4 points failed" in capsys.readouterr().err
    arguments[-1] = "true {out}"
    assert cli.main(arguments) == 0  # none had been handed on
    assert {p.state for p in points.load(files / "sweep.py", files / "out").points} == {"handed on"}


@pytest.mark.slow
def test_trains_for_real(tmp_path):
    """Two points: one trains, one is refused by training itself (three rows on two devices)."""
    (tmp_path / "sweep.py").write_text(
        SWEEP.replace("8}", '1, "model.vlm.layers": 1, "model.vlm.vision.layers": 1, "model.vlm.unroll": 1}')
        .replace('"stages.pretrain.optimizer.learning_rate": (1e-4, 1e-2)', '"stages.pretrain.rows": (3, 2)')
        .replace("(1.0, 2.0)", "(1.0,)")
    )
    command = [sys.executable, "-m", "starflow2_jax.cli", "sweep", "--sweep", "sweep.py", "--out", "out", "--runlocal"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "1 of 2 points failed" in done.stderr, done.stderr
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["points"]
    assert [r["rows"] for r in rows] == [2, 3] and np.isfinite(rows[0]["pretrain/loss"])
    assert "must be a multiple of 2" in rows[1]["state"]


def test_the_chip_goes_to_every_point(tmp_path):
    """To its config, its folder and its command; the experiment and the sweep may be this package's, by name."""
    text = SWEEP.replace(f"{ROOT}/starflow2_jax/experiments/digits_quick.py", "starflow2_7b_t2i").replace(
        "pretrain", "text_to_image"
    )
    (tmp_path / "sweep.py").write_text(text)
    sweep, other = (points.load(tmp_path / "sweep.py", tmp_path / "out", chip=chip) for chip in ("v5e", "v6e"))
    assert not {p.folder for p in sweep.points} & {p.folder for p in other.points}
    for command in (
        points.train_command(sweep, sweep.points[0]),
        points.launch_command(sweep, sweep.points[0], "go {overrides}"),
    ):
        at = command.index("--chip")
        assert command[at + 1] == "v5e" and command[at + 2].startswith("--config.order=")
    with pytest.raises(
        config.ConfigError, match="settings for the chips v5e, v5p, v6e, h100, a100-80, h200, b200, not for 'v4'"
    ):
        points.load(tmp_path / "sweep.py", tmp_path / "out", chip="v4")
    assert len(points.load("digits_lr", tmp_path / "out").points) == 4
