"""SIGINT and SIGTERM at the start, in the middle and at the end of a command: one line, and the documented exit
code.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from starflow2_jax import cli
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.config import loading as configs

ROOT = Path(__file__).parents[1]
START = "import os; os.kill(os.getpid(), {number})\n"
MIDDLE = """import os
from starflow2_jax.parallel import devices
def start():
    os.kill(os.getpid(), {number})
    raise AssertionError("the signal was lost")
devices.start = start
"""
# A destructor that runs when the signal comes drops exceptions, which Python only prints.
DROPPED = """import os, time
from starflow2_jax.checkpoints.steps import report_once
from starflow2_jax.parallel import devices
report_once()  # as in training: it has a hook of its own for what Python drops
class Noisy:
    def __del__(self):
        os.kill(os.getpid(), {number})
        sum(range(10))
def start():
    Noisy()
    time.sleep(60)
devices.start = start
"""
# A library that does not return, such as a compiler. Python's handlers wait for it; signals keep coming until the
# process ends.
BLOCKED = """import ctypes
from starflow2_jax.parallel import devices
def start():
    ctypes.CDLL(None).system(b"exec >/dev/null 2>&1; while kill -TERM $PPID; do :; done")
devices.start = start
"""
# The second signal comes when Python has ended all but itself.
TEARDOWN = """import os, signal
from starflow2_jax.parallel import devices
def start():
    os.kill(os.getpid(), {number})
devices.start = start
class Last:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, {number})
os.kept_until_the_end = Last()
"""
END = "import atexit, os; atexit.register(lambda: (os.kill(os.getpid(), {number}), sum(range(10))))\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    CheckpointDirectory(folder / "checkpoint").create(configs.load("digits_quick"), tiny.CODEC, tiny.tokenizer())
    (folder / "document").write_text(json.dumps([{"text": "seven", "predict": True}]))
    return folder


def run(folder: Path, line: list[str], **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "starflow2_jax.cli", *line]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **more,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, cli.RESTART)])
@pytest.mark.parametrize(
    "where, line",
    [
        (START, ["sample", "--prompt", "x", "--checkpoint", "checkpoint"]),
        (MIDDLE, ["score", "--document", "document", "--checkpoint", "checkpoint"]),
        pytest.param(MIDDLE, ["train", "--config", "digits_quick", "--out", "run"], marks=pytest.mark.slow),
        pytest.param(MIDDLE, ["serve", "--checkpoint", "checkpoint", "--port", "0"], marks=pytest.mark.slow),
        pytest.param(MIDDLE, ["bench", "data", "--config", "digits_quick"], marks=pytest.mark.slow),
        pytest.param(DROPPED, ["chat", "--checkpoint", "checkpoint"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_command_in_one_line(folder, where, line, number, code):
    (folder / "hook.py").write_text(where.format(number=int(number)))
    done = run(folder, [*line, "--import", "hook.py"])
    assert done.returncode == code, done.stderr
    said = "interrupted" if number == signal.SIGINT else "told to end (SIGTERM)"
    assert done.stderr.startswith(f"starflow2: {said}; ") and done.stderr.count("\n") == 1, done.stderr


def test_a_second_signal_ends_a_server_that_compiles(folder):
    (folder / "hook.py").write_text(BLOCKED)
    done = run(folder, ["serve", "--checkpoint", "checkpoint", "--port", "0", "--import", "hook.py"])
    assert done.returncode == cli.RESTART, done.stderr
    assert done.stderr == "starflow2: ended at once by the second signal; what was not finished is lost\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, cli.RESTART)])
def test_a_second_signal_while_python_ends_keeps_the_exit_code(folder, number, code):
    (folder / "hook.py").write_text(TEARDOWN.format(number=int(number)))
    done = run(folder, ["score", "--document", "document", "--checkpoint", "checkpoint", "--import", "hook.py"])
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_changes_nothing(folder, number):
    (folder / "hook.py").write_text(END.format(number=int(number)))
    done = run(folder, ["config", "--config", "digits_quick", "--import", "hook.py"])
    assert done.returncode == 0 and not done.stderr and "seed" in done.stdout
    (folder / "hook.py").write_text(TEARDOWN.format(number=int(number)))
    done = run(folder, ["config", "--config", "digits_quick", "--import", "hook.py"])
    assert done.returncode == 0 and not done.stderr


def test_a_reader_that_ends_first(folder):
    """As in `starflow2 config ... | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "starflow2_jax.cli", "config", "--config", "digits_quick"]
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == cli.UNREAD and not done.stderr
