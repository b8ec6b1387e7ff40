"""`starflow2 init` as a user calls it: the sizes of the VLM, what is said on the way, and the line that it ends
with.
"""

import json
import shlex
from pathlib import Path

import pytest
from test_init import vlm  # noqa: F401 - a fixture

from starflow2_jax import cli
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.commands import training
from starflow2_jax.parallel import devices

FLOWS = [
    f"--config.model.{flow}.{key}={value}"
    for flow in ("shallow", "deep")
    for key, value in (("layers", 1), ("width", 32), ("heads", 2), ("mlp_hidden", 32))
]
GIVEN = [
    "--config.order=text_to_image,joint",
    "--config.model.deep_rotary_sections=2,3,3",
    "--config.mesh.data=8",
    *FLOWS,
]


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """The devices of the tests are started already."""
    monkeypatch.setattr(training, "start_devices", lambda *_: None)


def init(folder: Path, out: Path, *more: str) -> int:
    return cli.main(["init", "--vlm", str(folder), "--config", "digits_quick", *GIVEN, "--out", str(out), *more])


@pytest.mark.slow
def test_the_vlm_is_as_its_folder_says(vlm, tmp_path, capsys):  # noqa: F811
    """No size is typed again, neither to begin nor, by the line that `init` prints, to train."""
    assert init(vlm, tmp_path / "a run") == 0
    *said, last = capsys.readouterr().out.splitlines()
    begun, want = CheckpointDirectory(tmp_path / "a run").config().model.vlm, json.loads((vlm / "vlm.json").read_text())
    for key in ("layers", "width", "heads", "vocabulary"):
        assert begun[key] == want[key]
    assert begun.vision.patch == want["vision"]["patch"] == 4
    words = shlex.split(last.removeprefix("ready: "))
    assert words[:2] == ["starflow2", "train"] and set(GIVEN) <= set(words) and words[-1] == str(tmp_path / "a run")
    assert any("parameters of the untrained flows" in line and "this machine's memory" in line for line in said)
    assert [
        w for w in ("copying the VLM", "making deep", "writing the checkpoint") if not any(w in x for x in said)
    ] == []
    assert CheckpointDirectory(tmp_path / "a run").steps.latest() == 0
    few = ["--config.stages.*.steps=1", "--config.stages.*.rows=8"]
    assert cli.main([*words[1:], *few]) == 0
    assert CheckpointDirectory(tmp_path / "a run").steps.latest() == 2


def test_flows_that_do_not_fit_are_refused(vlm, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000.0)
    assert init(vlm, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "1e-06 GB are free" in message and "--force" in message and list(tmp_path.iterdir()) == []
    assert init(vlm, tmp_path / "run", "--force") == 0


def test_a_size_that_the_vlm_does_not_have_is_refused(vlm, tmp_path, capsys):  # noqa: F811
    assert init(vlm, tmp_path / "run", "--config.model.vlm.layers=3") == 2
    assert "layers is 2, not 3" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
