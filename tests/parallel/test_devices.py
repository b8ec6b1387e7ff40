"""JAX's devices that do not start: one sentence with the variable, the extra, and the other process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from starflow2_jax.errors import UserError
from starflow2_jax.parallel import devices

ROOT = Path(__file__).parents[2]
BUSY = f"Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid {os.getppid()}. Not attempting"
CUDA = "Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_DEVICE_UNAVAILABLE: all CUDA-capable devices are busy"


@pytest.mark.parametrize(
    "error, platforms, saying",
    [
        ("", "cuda", ("JAX_PLATFORMS=cuda", "a GPU", "starflow2_jax[cuda]")),
        ("Backend 'rocm' is not known", "gpu", ("JAX_PLATFORMS=gpu", "a GPU", "starflow2_jax[cuda]", "rocm")),
        ("No jellyfish device (set JAX_PLATFORMS='' to choose)", "tpu,cpu", ("tpu,cpu", "a TPU", "starflow2_jax[tpu]")),
        (BUSY, "", ("the TPU is in use by process", f"{os.getppid()} (", "JAX_PLATFORMS=cpu")),
        (CUDA, "", ("the GPU is in use by", "process")),
        ("Unable to initialize backend 'metal': unknown", "metal", ("JAX_PLATFORMS=metal", "unset it")),
        ("a plugin\nfailed", "", ("cannot start", "a plugin failed", "JAX_PLATFORMS=cpu")),
    ],
)
def test_each_error_is_one_sentence(error, platforms, saying):
    sentence = devices.explanation(error, platforms)
    assert all(words in sentence for words in saying) and "\n" not in sentence and len(sentence) < 600, sentence
    assert "(set JAX_PLATFORMS=''" not in sentence


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no device")])
def test_errors_of_jax_become_errors_of_users(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError):
        devices.start()


def test_a_process_that_holds_a_device_is_found(monkeypatch):
    monkeypatch.setitem(devices.DEVICE_FILES, "GPU", re.compile("/dev/full"))
    code = "import sys; f = open('/dev/full'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert any(holder.startswith(f"{other.pid} (") for holder in devices.holders("GPU"))
        other.stdin.close()


def test_a_platform_that_is_not_there(tmp_path):
    """As a user sees it: the message of the command line, before any work."""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "starflow2_jax.cli", "train", "--config", "digits_quick", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("starflow2: JAX_PLATFORMS=cuda asks for a GPU"), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable, value", [("JAX_ENABLE_X64", "maybe"), ("JAX_NUM_CPU_DEVICES", "many")])
def test_a_variable_that_jax_refuses(tmp_path, variable, value):
    """JAX reads it while it is imported."""
    command = [sys.executable, "-m", "starflow2_jax.cli", "bench", "data", "--config", "digits_quick"]
    done = subprocess.run(
        command,
        env=os.environ | {variable: value, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("starflow2: JAX cannot start") and value in said and "unset it" in said, done.stderr
