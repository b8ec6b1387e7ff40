"""launch/local.sh with stand-ins for `starflow2`: what is started, started again, and passed on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local.sh"


@pytest.fixture
def venv(tmp_path):
    """Makes an environment whose `starflow2` is a shell script that notes its arguments."""

    def make(body: str) -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").symlink_to(sys.executable)
        program = tmp_path / "bin" / "starflow2"
        program.write_text(f'#!/usr/bin/env bash\necho "$@" >>"{tmp_path}/calls"\n{body}\n')
        program.chmod(0o755)
        return {**os.environ, "VENV": str(tmp_path)}

    return make


def local(*arguments: str, env=None) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False)


def calls(folder: Path) -> list[str]:
    return sorted((folder / "calls").read_text().splitlines())


def test_a_dry_run_prints_every_command():
    done = local("--processes", "3", "--port", "1234", "--dry-run", "--", "train", "--config", "my config.py")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        rf"starflow2 train --config my\ config.py --distributed --coordinator localhost:1234 --processes 3 --process {i}"
        for i in range(3)
    ]


@pytest.mark.parametrize(
    "arguments, saying",
    (((), "after --"), (("--processes",), "takes a number"), (("--processes", "0", "--", "train"), "above 0"), (("train",), "train")),
)  # fmt: skip
def test_wrong_use(arguments, saying):
    done = local(*arguments)
    assert done.returncode == 2 and saying in done.stderr and done.stdout == ""


def test_all_processes_run_once(venv, tmp_path):
    assert local("--port", "1234", "--", "train", "--out", "a b", env=venv("exit 0")).returncode == 0
    common = "train --out a b --distributed --coordinator localhost:1234 --processes 2 --process"
    assert calls(tmp_path) == [f"{common} 0", f"{common} 1"]


@pytest.mark.parametrize("code, times", ((2, 1), (1, 3), (75, 3), (137, 3)))
def test_what_is_started_again(venv, tmp_path, code, times):
    """Process 1 ends so each time; process 0 would wait for it forever, or saves, too."""
    other = "exit 75" if code == 75 else "exec tail -f /dev/null"
    body = f'[[ "$*" == *"--process 1"* ]] && exit {code}\n{other}'
    done = local("--restarts", "2", "--", "train", env=venv(body))
    assert done.returncode == code, done.stderr
    assert len([c for c in calls(tmp_path) if c.endswith("--process 1")]) == times
    assert done.stderr.count("starting all again") == times - 1


def test_a_restart_that_helps(venv, tmp_path):
    body = f'mkdir "{tmp_path}/first" 2>/dev/null && exit 1\n[[ -e "{tmp_path}/first" ]] && exit 0'
    done = local("--processes", "1", "--", "train", env=venv(body))
    assert done.returncode == 0 and done.stderr.count("starting all again") == 1


def test_sigterm_is_passed_on_and_nothing_is_started_again(venv, tmp_path):
    body = f"""trap 'echo saved >>"{tmp_path}/saved"; exit 75' TERM
echo ready >&2
while :; do read -t 1 <> <(:) || true; done"""
    process = subprocess.Popen([SCRIPT, "--", "train"], env=venv(body), stderr=subprocess.PIPE, text=True)
    ready = 0
    while ready < 2:
        ready += process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n" and len(calls(tmp_path)) == 2
    process.stderr.close()
