"""Two runs in one directory: the second is refused, and what a crash leaves can be taken over."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starflow2_jax.checkpoints import lock as locks
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.lock import EXPIRES, Lock, LockedError, UncertainLockError

ROOT = Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from starflow2_jax.checkpoints.lock import Lock
with Lock(pathlib.Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def change(folder: Path, age: float = 0.0, **values) -> None:
    """Another owner in the lock of `folder`, renewed `age` seconds ago."""
    path = folder / "lock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_run_is_refused_in_one_sentence(tmp_path, holder):
    folder = tmp_path / "run"
    before = (folder / "lock.json").read_bytes()
    with pytest.raises(LockedError) as refused, CheckpointDirectory(folder).writing():
        pass
    said = str(refused.value)
    assert f"process {holder.pid} on " in said and str(folder) in said and "--out" in said and "\n" not in said
    assert refused.value.exit_code == 2
    assert [path.name for path in folder.iterdir()] == ["lock.json"] and (folder / "lock.json").read_bytes() == before


@pytest.mark.parametrize("reaped", (True, False))
def test_what_a_killed_process_of_this_machine_leaves_is_replaced(tmp_path, holder, capsys, reaped):
    holder.kill()
    if reaped:
        holder.wait()
    else:  # it is a zombie from here on
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with Lock(tmp_path / "run").held():
        assert json.loads((tmp_path / "run/lock.json").read_text())["process"] == os.getpid()
    assert "left by a run that has ended" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_another_process_of_the_same_number_is_another(tmp_path, holder):
    change(tmp_path / "run", born="1")
    Lock(tmp_path / "run").require_free()


def test_a_reboot_ends_all_processes(tmp_path, holder):
    change(tmp_path / "run", boot="another", process=os.getpid())
    Lock(tmp_path / "run").require_free()


@pytest.mark.parametrize("elsewhere", (dict(host="other", boot="another"), dict(namespace="pid:[1]")))
def test_another_machine_keeps_its_lock_while_it_renews_it(tmp_path, holder, elsewhere):
    """Nobody can ask it whether the process lives, so the way out is named; after a while it counts as dead."""
    change(tmp_path / "run", age=90, **elsewhere)
    with pytest.raises(UncertainLockError, match=r"9\d s ago.*have checked.*remove .*lock.json.*600 s") as refused:
        Lock(tmp_path / "run").require_free()
    assert refused.value.exit_code == 75
    change(tmp_path / "run", age=EXPIRES + 1)
    Lock(tmp_path / "run").require_free()


def test_a_lock_that_is_being_written_counts(tmp_path):
    (tmp_path / "lock.json").touch()
    with pytest.raises(UncertainLockError, match="unknown host"):
        Lock(tmp_path).require_free()


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.01)
    lock = Lock(tmp_path)
    with lock.held():
        change(tmp_path, age=1000)
        end = time.monotonic() + 30
        while time.time() - lock.path.stat().st_mtime > 500:
            assert time.monotonic() < end


def test_a_run_whose_lock_was_taken_saves_nothing_more(tmp_path):
    lock = Lock(tmp_path)
    with lock.held():
        lock.require_held()
        change(tmp_path, id="another")
        with pytest.raises(LockedError, match="taken by another run; nothing more is saved"):
            lock.require_held()
    assert lock.path.exists()  # it is the other run's
