"""A disk that is full or read-only, or no memory left: one sentence with path and cause, and exit code 74, 2 or 1."""

import errno
import os

import jax
import pytest

from starflow2_jax import cli
from starflow2_jax.errors import StorageError
from starflow2_jax.weights import convert

LINE = ["convert", "qwen2_5_vl", "--from", "weights", "--to", "new vlm"]


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("wrapped", ["plain", "with a path", "as text", "as a cause"])
def test_a_write_that_the_file_system_refuses(number, wrapped, monkeypatch, capsys):
    def write(*args):
        cause = OSError(number, os.strerror(number), "some/file" if wrapped == "with a path" else None)
        if wrapped == "as text":
            raise ValueError(f"RESOURCE_EXHAUSTED: [OS error {number}: {os.strerror(number)}] [source locations]")
        if wrapped == "as a cause":
            raise RuntimeError("a thread failed") from cause
        raise cause

    monkeypatch.setattr(convert, "to_checkpoint", write)
    assert cli.main(LINE) == StorageError.exit_code == 74
    error = capsys.readouterr().err
    path = "some/file" if wrapped == "with a path" else "new vlm"
    assert error.startswith(f"starflow2: {path} cannot be written: {os.strerror(number)}") and error.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EEXIST, errno.ENOTDIR])
def test_a_path_that_cannot_be_used(number, monkeypatch, capsys):
    def write(*args):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(convert, "to_checkpoint", write)
    assert cli.main(LINE) == 2
    assert f"some/file: {os.strerror(number)}; name another path" in capsys.readouterr().err


def test_a_full_device(monkeypatch, capsys):
    """/dev/full refuses every write, by an error without a path."""
    from starflow2_jax.commands import bench

    monkeypatch.setattr(bench, "_measure", lambda *args: {"steps": 1})
    monkeypatch.setattr("starflow2_jax.commands.training.start_devices", lambda *args: None)
    assert cli.main(["bench", "data", "--config", "digits_quick", "--json", "/dev/full"]) == 74
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err


def test_other_errors_stay_errors(monkeypatch):
    def fail(*args):
        raise ValueError("an error in the program")

    monkeypatch.setattr(convert, "to_checkpoint", fail)
    with pytest.raises(ValueError, match="an error in the program"):
        cli.main(LINE)


@pytest.mark.parametrize(
    "error, saying",
    [
        (
            MemoryError("Unable to allocate 8.00 GiB for an array"),
            "this machine has no memory left (Unable to allocate 8.00",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GB"),
            "the device has no memory left (RESOURCE_EX",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
            "memory left",
        ),
    ],
    ids=["machine", "device", "CPU"],
)
def test_no_memory_left(error, saying, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(convert, "to_checkpoint", fail)
    assert cli.main(LINE) == 1
    said = capsys.readouterr().err
    assert said.startswith("starflow2: ") and saying in said and said.count("\n") == 1
