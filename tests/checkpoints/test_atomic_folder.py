"""Folders that are whole or absent, also where two processes make the same one."""

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
