"""metrics.jsonl of a machine that lost its power: damaged lines are dropped, and the run goes on."""

from starflow2_jax.evaluation.report import read_metrics
from starflow2_jax.training.metrics import Metrics

GOOD = b'{"step": 1, "stage": "joint", "text_loss": 2.0}\n'


def test_damaged_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b'\xff\xfe{"step": 1}\n' + b"\0" * 40 + b'\n3\n{"stage": "joint"}\n' + b'{"st')
    assert read_metrics(path) == {("joint", "text_loss"): {1: 2.0}}
    with Metrics(tmp_path, done=1):
        pass
    assert path.read_bytes() == GOOD
