"""Batches in which nothing is predicted, and data that has another length when a run resumes."""

import json

import pytest
from stand_in import Documents, lines, with_stand_ins
from tiny_experiment import tiny_config

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.data.documents import Text
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.training.loop import Trainer


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    return lambda **changes: with_stand_ins(monkeypatch, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    "stage, named", (("text_to_image", '"generate": true'), ("joint", '"generate": true or texts with "predict": true'))
)
def test_documents_without_targets_are_refused_at_the_first_batch(tmp_path, stage, named):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps([{"text": f"number {i}"}]) + "\n" for i in range(40)))
    config = tiny_config(order=("pretrain", stage))
    config.data, config.codec = dict(source=str(path)), dict(kind="latents", grid=(2, 2), channels=16)
    config.stages.pretrain.steps = 1
    with pytest.raises(ConfigError, match=f"first batch of stage {stage}.*data.jsonl.*{named}") as refused:
        Trainer(config, tmp_path / "run").run(progress=False)
    assert '"predict"' in str(refused.value) and "\n" not in str(refused.value)


def test_a_later_batch_without_targets_warns_and_is_counted(trainer, monkeypatch, capsys):
    monkeypatch.setattr(Documents, "__getitem__", lambda _, i: [Text(f"document number {i}", predict=i < 300)])
    t = trainer()
    summary = t.run(progress=False)
    without = [line["step"] for line in lines(t) if line["targets"] == 0]
    assert 1 < len(without) < 14 and without[-1] == 16
    assert summary["faults"]["without_targets"] == lines(t)[-1]["without_targets"] == len(without)
    kept = json.loads((t.checkpoints.folder / "metrics/summary.json").read_text())
    assert kept["faults"]["without_targets"] == len(without)
    said = [line for line in capsys.readouterr().err.splitlines() if "nothing is predicted" in line]
    assert f"batch of step {without[0]} " in said[0] and "1 such steps" in said[0] and "2 such steps" in said[1]
    assert len(said) == len(without).bit_length()


@pytest.mark.parametrize("length", (500, 2**32))
def test_data_of_another_length_is_said_when_a_run_resumes(trainer, monkeypatch, capsys, length):
    t = trainer()
    t.run(progress=False, stop_at=6)
    assert CheckpointDirectory(t.checkpoints.folder).steps.meta(6)["documents"] == {"numbers": 2**32}
    capsys.readouterr()
    monkeypatch.setattr(Documents, "__len__", lambda _: length)
    trainer().run(progress=False)
    warned = (
        f"the data source 'numbers' has {length} documents, but had {2**32} when step 6 was saved"
        in capsys.readouterr().err
    )
    assert warned == (length == 500)


def test_steps_to_trace_are_no_negative_number(trainer):
    with pytest.raises(UserError, match="at least 0, not -1"):
        trainer().run(progress=False, profile=-1)
