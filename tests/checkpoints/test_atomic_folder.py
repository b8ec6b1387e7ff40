"""Folders that are whole or absent, also where two processes make the same one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from starflow2_jax.checkpoints.atomic_folder import new_folder
from starflow2_jax.errors import UserError


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_that_another_process_makes_meanwhile_stays_as_it_is(tmp_path, empty):
    target: Path = tmp_path / "new"
    with pytest.raises(UserError, match="new exists already"), new_folder(target, 1) as folder:
        (folder / "file").write_text("the second's")
        target.mkdir()
        if not empty:
            (target / "file").write_text("the first's")
    assert list(tmp_path.iterdir()) == [target]
    assert [file.read_text() for file in target.iterdir()] == ([] if empty else ["the first's"])


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Of this folder, and of processes of this machine that have ended; the others may still be at work."""
    program = (
        "import os, sys; from pathlib import Path; from starflow2_jax.checkpoints.atomic_folder import new_folder\n"
        "with new_folder(Path(sys.argv[1]), 1) as folder: (folder / 'weights').write_text('half'); print(folder); "
        "os._exit(9)"
    )
    left = {}
    for name in ("new", "other"):
        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / name], stdout=subprocess.PIPE, text=True, check=False
        )
        left[name] = Path(done.stdout.strip())
        assert done.returncode == 9 and (left[name] / "weights").exists()
    living = left["new"].with_name(f".new.{socket.gethostname()}.{os.getppid()}.partial")
    elsewhere = left["new"].with_name(".new.elsewhere.99999999.partial")
    for folder in (living, elsewhere):
        folder.mkdir()
    with new_folder(tmp_path / "new", 1):
        assert not left["new"].exists()
    assert all(folder.exists() for folder in (left["other"], living, elsewhere, tmp_path / "new"))
