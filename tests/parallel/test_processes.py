"""Joining the processes of a run: flags, environment and their faults."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny_experiment import tiny_config

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.errors import UserError
from starflow2_jax.parallel import processes


def arguments(distributed=True, coordinator=None, processes=None, process=None) -> SimpleNamespace:
    return SimpleNamespace(distributed=distributed, coordinator=coordinator, processes=processes, process=process)


@pytest.fixture
def joined(monkeypatch) -> list:
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: found.append(a))
    for name in processes.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    return found


def test_nothing_is_guessed(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    processes.initialize(arguments(distributed=False))
    assert joined == []


def test_flags_environment_and_cluster(joined, monkeypatch):
    processes.initialize(arguments())
    assert joined == [(None, None, None)]  # JAX asks the cluster
    processes.initialize(arguments(True, "host:1", "4", "3"))
    assert joined[1:] == [("host:1", 4, 3)]
    for name, value in zip(processes.ENVIRONMENT.values(), ("other:2", "8", "7"), strict=True):
        monkeypatch.setenv(name, value)
    processes.initialize(arguments(process="0"))
    assert joined[2:] == [("other:2", 8, 0)]


@pytest.mark.parametrize(
    "given, saying",
    (
        (arguments(False, processes="2"), "add --distributed"),
        (arguments(coordinator="host:1"), "--processes, --process is missing"),
        (arguments(True, "host", "2", "0"), "HOST:PORT"),
        (arguments(True, "host:1", "two", "0"), "must be numbers"),
        (arguments(True, "host:1", "2", "2"), "--process=2 must be below --processes=2"),
    ),
)
def test_wrong_use(joined, given, saying):
    with pytest.raises(UserError, match=saying):
        processes.initialize(given)
    assert joined == []


def test_no_cluster(monkeypatch):
    def fail(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="do not find each other .coordinator_address should be defined."):
        processes.initialize(arguments())


ASKING = """
import sys
import jax
from starflow2_jax.checkpoints import damage
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.errors import UserError

address, process, *folders = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
for folder in map(CheckpointDirectory, folders):
    print(folder.steps.latest(), folder.steps.has(2, "params"), folder.steps.has(2, "ema"))
try:
    damage.pass_over_damaged(CheckpointDirectory(folders[0]).steps)
except UserError as error:
    print(str(error).partition(" in ")[0])
"""


def test_processes_that_see_different_files_agree_with_the_first(tmp_path):
    """Each has a folder of its own in place of its host's view of one.

    In the second view there is more: a step, an average of step 2, and a run that the first does not see at all. To the
    first, all steps are damaged: both say so.
    """
    first, second = tmp_path / "0", tmp_path / "1"
    saved = CheckpointDirectory(first / "run")
    saved.folder.mkdir(parents=True)
    saved.write_config(tiny_config())
    for number in (1, 2, 3):
        saved.steps.save(number, {"params": {"a": jnp.ones(2)}}, {})
    saved.steps.close()
    shutil.copytree(first, second)
    shutil.copytree(first / "run", second / "unseen")
    shutil.rmtree(first / "run" / "steps" / "3")
    (second / "run" / "steps" / "2" / "ema").mkdir()
    for number in ("1", "2"):
        (first / "run" / "steps" / number / "files.json").write_text("cut of")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ASKING, address, str(process), view / "run", view / "unseen"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for process, view in enumerate((first, second))
    ]
    try:
        said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [lines[-3:] for lines in said] == 2 * [["2 True False", "None False False", "every saved step"]]
