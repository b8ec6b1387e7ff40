"""launch/rehearsal.sh: the whole way of a paper-size model at a tiny size, its plans, and wrong arguments."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/rehearsal.sh"
STAND_IN = """#!/bin/bash
printf '%q ' "$@" >>"$RECORD"; echo >>"$RECORD"
while (($#)); do
  if [[ $1 == --json ]]; then
    echo '[{"fits": true, "seconds": 2.5, "chips": 64, "steps": 100000, "mfu": 0.5, "peak": 2147483648, "memory": 4294967296}]' >"$2"
  fi
  shift
done
"""


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(ROOT), **variables}
    command = [SCRIPT, *arguments]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_everything_happens_once(tmp_path):
    """Two picture files come out, and the run's codec is the one that was trained."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    command = [str(SCRIPT), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    [sample] = out.glob("samples/*.png")
    for file in (sample, out / "served.png"):
        with Pillow.open(file) as picture:
            assert picture.size == (32, 32) and picture.mode == "RGB" and np.ptp(np.asarray(picture)) > 0
    codec, own = (json.loads((out / name / "codec.json").read_text()) for name in ("codec", "run"))
    assert own["content_hash"] == codec["content_hash"]
    lines = [json.loads(line) for line in (out / "run/metrics/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["text_to_image", "image_to_text", "joint"]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert [line["documents/documents"] > 0 for line in lines] == [True] * 3


def test_plans_of_every_stage(tmp_path):
    """With a stand-in for `starflow2`: each stage is planned once, and the table adds up."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "starflow2").write_text(STAND_IN)
    (folder / "python").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    record = tmp_path / "record"
    done = run("--plan", "v5p:4x4x4", "--out", tmp_path / "out", VENV=str(tmp_path), RECORD=str(record))
    assert done.returncode == 0, done.stderr
    calls = [shlex.split(line) for line in record.read_text().splitlines()]
    stages = [call[call.index("--stage") + 1] for call in calls]
    assert stages == ["features", "pixels", "pixels_tuned", "text_to_image", "image_to_text", "joint"]
    assert all(call[0] == "plan" and call[call.index("--chip") + 1] == "v5p" for call in calls)
    assert ["--codec" in call for call in calls] == [False] * 3 + [True] * 3
    rows = done.stdout.splitlines()
    assert len(rows) == 7 and rows[1].split() == [
        "1_codec_features", "100,000", "2.500", "2.9", "4,444", "50.0%", "2.0", "of", "4"
    ]  # fmt: skip


def test_a_plan_that_does_not_fit(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("rehearsal", SCRIPT.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = dict(fits=False, seconds=0, chips=8, steps=10, mfu=0, peak=2**31, memory=2**30)
    (tmp_path / "joint.json").write_text(json.dumps([plan]))
    module.table(tmp_path)
    assert "does not fit: 2.0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", ((["--no"], "unknown argument --no"), (["--out", "."], ". exists")))
def test_wrong_arguments(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_help():
    assert "DEVICES such as v5e:16x16" in run("--help").stdout
