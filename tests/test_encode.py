"""`starflow2 encode` from the command line: what it prints, what is trained from its folders, and that it may be
killed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from picture_files import png
from tiny_experiment import tiny_config

from starflow2_jax import cli
from starflow2_jax.checkpoints.lock import Lock
from starflow2_jax.data import digits, encoding
from starflow2_jax.data.documents import Image
from starflow2_jax.data.encoded import EncodedDocuments
from starflow2_jax.data.images import write_image
from starflow2_jax.errors import ConfigError
from starflow2_jax.training.loop import Trainer

COUNT = 60


def documents(folder: Path) -> Path:
    """A JSONL file of captioned gray pictures of 8 by 8 pixels."""
    lines = []
    for i in range(COUNT):
        name = write_image(folder / f"{i}", np.random.default_rng(i).uniform(-1, 1, (8, 8, 1)).astype(np.float32)).name
        lines.append([{"text": [digits.texts()[i % 30], f"a picture {i}"]}, {"image": name, "generate": True}])
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"


def encode(*arguments: object) -> int:
    return cli.main(["encode", *map(str, arguments)])


def losses(folder: Path, after: int) -> np.ndarray:
    lines = map(json.loads, (folder / "metrics" / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if line["step"] > after])


@pytest.mark.slow
def test_training_on_latents_equals_encoding_on_the_fly(tmp_path, capsys):
    file, live, stored = documents(tmp_path), tmp_path / "live", tmp_path / "stored"
    mesh = dict(data=8, fsdp=1, tensor=1)

    def config(path):
        c = tiny_config(mesh=mesh, order=("pretrain", "text_to_image"))
        c.data.source, c.data.sources = None, {"pictures": {"path": str(path)}}
        for stage in c.stages.values():
            stage.mix = {}
        return c

    Trainer(config(file), live).run(progress=False, stop_at=4)
    shutil.copytree(live, stored)
    assert encode("--source", f"json:{file}", "--out", tmp_path / "latents", "--codec", live, "--shards", 4) == 0
    assert f"{COUNT} documents; 0 duplicates are passed over, 0 could not be read" in capsys.readouterr().out
    source = EncodedDocuments(str(tmp_path / "latents"))
    assert all(isinstance(source[i][1], Image) for i in range(COUNT))
    Trainer(config(file), live).run(progress=False)
    Trainer(config(tmp_path / "latents"), stored).run(progress=False)
    wanted = losses(live, 4)
    assert len(wanted) == 4 and len(set(wanted)) == 4
    np.testing.assert_allclose(losses(stored, 4), wanted, rtol=1e-3)

    changed = json.loads((stored / "codec.json").read_text())
    changed["mean"][0] += 0.1
    (live / "codec.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"pictures.*latents of another codec"):
        longer = config(tmp_path / "latents")
        longer.stages.text_to_image.steps = 8
        Trainer(longer, live).task("text_to_image").batches()


def test_what_the_command_says(tmp_path, capsys):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in (0, 1, 1):
            writer.write({"__key__": str(len(os.listdir(tmp_path)) * 10 + i), "png": png(i), "title": "a zebra"})
    tar = ("--source", f"tar:{tmp_path}/*.tar", "--out", tmp_path / "out")
    assert encode(*tar, "--processes", 2, "--process", 2) == 2
    assert encode("--source", "parquets:x", "--out", tmp_path / "out") == 2
    assert "did you mean 'parquet'" in capsys.readouterr().err
    assert encode(*tar) == 0
    assert "0 documents" in capsys.readouterr().out


def parquet(path: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"image": [png(i % (count - 5)) for i in range(count)], "caption": [f"zebra {i}" for i in range(count)]}
    pq.write_table(pa.table(rows), path, row_group_size=50)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.drill
def test_two_processes_that_are_killed_again_and_again(tmp_path):
    parquet(tmp_path / "a.parquet", 3000)
    command = [sys.executable, "-m", "starflow2_jax.cli", "encode", "--source", f"parquet:{tmp_path}/a.parquet"]
    command += ["--shards", "30", "--size", "4"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    share = [[*command, "--out", str(tmp_path / "out"), "--processes", "2", "--process", str(i)] for i in range(2)]
    draws, killed, codes = random.Random(0), 0, [None, None]
    running = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for line in share]
    while any(code != 0 for code in codes):
        for i, process in enumerate(running):
            if codes[i] == 0:
                continue
            try:
                codes[i] = process.wait(timeout=draws.uniform(0.1, 4.0) if killed < 12 else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                codes[i] = None
            if codes[i] != 0:
                running[i] = subprocess.Popen(share[i], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed >= 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(EncodedDocuments(str(tmp_path / "out"))) == 2995


def test_a_full_disk_has_its_own_exit_code(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, *args: str):
            pass

        def write(self, record: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device; writing a")  # as ArrayRecord words it

    monkeypatch.setattr(encoding, "ArrayRecordWriter", Full)
    parquet(tmp_path / "a.parquet", 10)
    assert encode("--source", f"parquet:{tmp_path}/a.parquet", "--out", tmp_path / "out") == 74
    assert "No space left on device" in capsys.readouterr().err


def test_two_processes_of_one_share(tmp_path, capsys):
    """The second is refused: both would write the same shard. Other shares of the same number go on beside it."""
    line = ["--source", f"json:{documents(tmp_path)}", "--out", tmp_path / "shards", "--shards", 2]
    for held, process, processes in (("", 0, 1), ("", 1, 2), ("0-of-2.", 0, 1), ("0-of-2.", 0, 2), ("0-of-2.", 1, 3)):
        with Lock(tmp_path / "shards", f"lock.{held}json").held():
            assert encode(*line, "--process", process, "--processes", processes) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("starflow2: ") and f"writes into {tmp_path / 'shards'} already" in said
        assert not list((tmp_path / "shards").iterdir())
    with Lock(tmp_path / "shards", "lock.0-of-2.json").held():
        assert encode(*line, "--process", 1, "--processes", 2) == 0, capsys.readouterr().err
    assert encode(*line) == 0 and len(EncodedDocuments(str(tmp_path / "shards"))) == COUNT
    assert not list((tmp_path / "shards").glob("lock*"))
