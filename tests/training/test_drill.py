"""The fault drill: two processes with four devices each, killed at random and started again by launch/local.sh."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_experiment import drill_config

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.program import abstract_params

ROOT = Path(__file__).parents[2]
EXPERIMENT = ROOT / "tests" / "tiny_experiment.py"
STEPS = drill_config().stages.pretrain.steps

pytestmark = pytest.mark.drill


class Launched:
    """launch/local.sh with two processes; what it says is read while it runs."""

    def __init__(self, out: Path, cache: Path, *overrides: str):
        command = [ROOT / "launch/local.sh", "--restarts", "4", "--", "train", "--config", EXPERIMENT, "--out", out]
        env = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(ROOT / "tests") + ":" + str(ROOT)}
        env |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        self.out, self.said, self.pids, self.news = out, [], [], threading.Condition()
        self.process = subprocess.Popen(
            [*map(str, command), "--compilation-cache", str(cache), *overrides],
            env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
        )  # fmt: skip
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            with self.news:
                self.said.append(line)
                if line.startswith("local.sh: process") and " pid " in line:
                    self.pids.append(int(line.split()[-1]))
                self.news.notify()

    def strike(self, step: int, which: int, kind: signal.Signals, attempt: int) -> None:
        """Send a signal to one process of this attempt once the run has passed `step`."""
        poll = threading.Event()
        while len(self.pids) < 2 * attempt + 2 or last_step(self.out) < step:
            assert self.process.poll() is None, "".join(self.said)
            poll.wait(0.02)
        os.kill(self.pids[2 * attempt + which], kind)

    def finish(self) -> int:
        code = self.process.wait(timeout=1200)
        self.listener.join()
        return code


def last_step(folder: Path) -> int:
    path = folder / "metrics" / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in whole if line.endswith("\n")), default=0 if path.is_file() else -1)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled_for_two")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache) -> Path:
    launched = Launched(tmp_path_factory.mktemp("undisturbed") / "run", cache)
    assert launched.finish() == 0, "".join(launched.said)
    assert len(launched.pids) == 2, "".join(launched.said)
    return launched.out


def final(folder: Path) -> dict:
    trainer = Trainer(drill_config(), folder)
    shapes = abstract(abstract_params(trainer.model, "frozen"), trainer.mesh)
    return jax.device_get(trainer.checkpoints.steps.restore(STEPS, {"params": shapes})["params"])


def test_killed_at_random_it_ends_as_if_undisturbed(undisturbed, cache, tmp_path):
    """SIGTERM to one process alone, then SIGKILL twice: every loss bit for bit, so every document once, and weights.

    SIGTERM comes before the first step is compiled: JAX looks for it once a second, which may be longer than all steps.
    """
    rng = random.Random(5)
    launched = Launched(tmp_path / "run", cache)
    launched.strike(0, rng.randrange(2), signal.SIGTERM, attempt=0)
    launched.strike(rng.randrange(3, 7), rng.randrange(2), signal.SIGKILL, attempt=1)
    launched.strike(rng.randrange(7, 11), rng.randrange(2), signal.SIGKILL, attempt=2)
    assert launched.finish() == 0, "".join(launched.said)
    said = "".join(launched.said)
    assert len(launched.pids) == 8 and "(3 of 4)" in said and said.count("ended with 137") == 2
    assert "ended with 75; starting all again" in said and "all is saved" in said
    assert lines(launched.out) == lines(undisturbed)
    assert [line["step"] for line in lines(undisturbed)] == list(range(1, STEPS + 1))
    jax.tree.map(np.testing.assert_array_equal, final(launched.out), final(undisturbed))
    summary = json.loads((launched.out / "metrics" / "summary.json").read_text())
    assert summary["restarts"] == 3 and summary["steps"] == STEPS
    assert sum(summary["share"].values()) == pytest.approx(1.0)


def test_two_processes_compute_what_one_does(undisturbed, tmp_path):
    """Losses, norms of gradients and the final weights of 2 processes x 4 devices and of 1 x 8."""
    Trainer(drill_config(), tmp_path / "run").run(progress=False)
    for one, two in zip(lines(tmp_path / "run"), lines(undisturbed), strict=True):
        assert one["tokens"] == two["tokens"]
        np.testing.assert_allclose([one["loss"], one["grad_norm"]], [two["loss"], two["grad_norm"]], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), final(tmp_path / "run"), final(undisturbed))


def test_two_processes_cut_rows_positions_and_heads(cache, tmp_path):
    """The joint stage over all axes but one, against one process that cuts rows alone: losses and norms of
    gradients.
    """
    stages = {"pretrain": 1, "joint": 2}
    said = dict(order=tuple(stages), **{f"stages.{name}.steps": steps for name, steps in stages.items()})
    said |= {f"mesh.{axis}": size for axis, size in dict(data=1, fsdp=2, sequence=2, tensor=2).items()}
    overrides = [f"--config.{key}={value}" for key, value in said.items()]
    launched = Launched(tmp_path / "two", cache, *overrides)
    assert launched.finish() == 0, "".join(launched.said)
    config = drill_config(order=tuple(stages), mesh=dict(data=8, fsdp=1, tensor=1))
    for name, steps in stages.items():
        config.stages[name].steps = steps
    Trainer(config, tmp_path / "one").run(progress=False)
    assert [line["stage"] for line in lines(tmp_path / "two")] == ["pretrain", "joint", "joint"]
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["tokens"] == two["tokens"]
        wanted, found = ([line[name] for name in line if name.endswith(("loss", "norm"))] for line in (one, two))
        np.testing.assert_allclose(wanted, found, rtol=1e-4)


def test_one_process_goes_on_with_what_two_saved(undisturbed, tmp_path):
    """Another number of hosts and another mesh; the data position is that of the groups."""
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    for part in (f"steps/{STEPS}", "frozen"):
        shutil.rmtree(folder / part)
    assert 0 < CheckpointDirectory(folder).steps.latest() < STEPS
    Trainer(drill_config(mesh=dict(data=8, fsdp=1, tensor=1)), folder).run(progress=False)
    assert [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
    for one, two in zip(lines(folder), lines(undisturbed), strict=True):
        assert one["tokens"] == two["tokens"]
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)
