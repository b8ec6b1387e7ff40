"""`log_every` and `save_every` of 0: no metrics while training, and only the checkpoint at the end of a stage."""

from tiny_experiment import tiny_config

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.training.loop import Trainer


def test_zero_means_off(tmp_path):
    config = tiny_config(order=("pretrain",), log_every=0, save_every=0)
    config.stages.pretrain.steps = 3
    Trainer(config, tmp_path / "run").run(progress=False)
    assert CheckpointDirectory(tmp_path / "run").steps.latest() == 3
    assert [path.name for path in (tmp_path / "run/steps").iterdir()] == ["3"]
    lines = tmp_path / "run/metrics/metrics.jsonl"
    assert not lines.exists() or not lines.read_text()
