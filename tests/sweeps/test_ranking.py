"""Which metric a sweep ranks by, and the average over seeds. Trainings are files that a test writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from starflow2_jax.errors import ConfigError
from starflow2_jax.sweeps import points, report

SWEEP = """
from starflow2_jax.sweeps.points import grid
CONFIG = "digits_quick"
ALWAYS = {"order": ("pretrain", "joint"), "stages.pretrain.steps": 0, "stages.joint.steps": 8}
def points():
    return grid({"stages.joint.optimizer.learning_rate": (1e-3, 1e-2), "seed": (0, 1, 2)})
"""


def load(folder: Path, text: str = SWEEP) -> points.Sweep:
    (folder / "sweep.py").write_text(text)
    return points.load(folder / "sweep.py", folder / "out")


def finish(point: points.Point, last: float) -> None:
    """What a run leaves that is done."""
    (point.run / "steps/8").mkdir(parents=True)
    (point.run / "metrics").mkdir()
    found = [dict(stage="joint", step=n, loss=float(n)) for n in (2, 4, 6, 8)]
    found += [{"stage": "joint", "step": n, "val/ema_loss": value} for n, value in ((4, 70.0), (8, last))]
    (point.run / "metrics/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


@pytest.mark.parametrize(
    "change, metric, result",
    (
        ("", "joint/val/ema_loss", 1.5),  # the last value: its documents are always the same
        ('METRIC = "joint/loss"', "joint/loss", 6.0),  # the mean of the last three
        ('ALWAYS["best_metric"] = "val/loss"', "joint/val/loss", None),
        ('ALWAYS["best_metric"] = "loss"', "joint/loss", 6.0),
        ('ALWAYS["evals.val.stages"] = ("pretrain",)', "joint/loss", 6.0),
    ),
)
def test_the_metric(tmp_path, change, metric, result):
    sweep = load(tmp_path, f"{SWEEP}{change}\n")
    finish(sweep.points[0], 1.5)
    assert sweep.metric == metric and sweep.result(sweep.points[0]) == result


def test_seeds_are_averaged(tmp_path):
    sweep = load(tmp_path)
    losses = {1e-3: (1.0, 2.0, 6.0), 1e-2: (2.0, 2.5, None)}
    seen = dict.fromkeys(losses, 0)
    for point in sweep.points:
        rate = point.overrides["stages.joint.optimizer.learning_rate"]
        if (loss := losses[rate][point.overrides["seed"]]) is not None:
            finish(point, loss)
        seen[rate] += 1
    assert set(seen.values()) == {3}
    rows = report.write(sweep, tmp_path / "out")
    wanted = [(1e-2, 2.25, np.sqrt(0.125), "2 of 3", "not run"), (1e-3, 3.0, np.sqrt(7.0), "3 of 3", "done")]
    assert [tuple(row.values()) for row in rows] == [
        tuple(pytest.approx(value) if isinstance(value, float) else value for value in row) for row in wanted
    ]
    found = json.loads((tmp_path / "out/sweep.json").read_text())
    assert found["means"] == rows and len(found["points"]) == 6 and "seed" in found["points"][0]
    table = (tmp_path / "out/sweep.md").read_text().splitlines()
    assert table[0] == "| learning_rate | joint/val/ema_loss | spread | seeds | state |" and len(table) == 4
    assert (tmp_path / "out/sweep.png").stat().st_size > 5000


def test_the_plot_shows_the_spread(tmp_path, monkeypatch):
    sweep = load(tmp_path)
    for i, point in enumerate(sweep.points):
        finish(point, float(i**2))
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda self, x, y, error, **_: drawn.append((x, y, error)))
    report.write(sweep, tmp_path / "out")
    [(x, y, error)] = drawn
    assert x == [1e-3, 1e-2]
    np.testing.assert_allclose(y, [np.mean([0, 1, 4]), np.mean([9, 16, 25])])
    np.testing.assert_allclose(error, [np.std([0, 1, 4], ddof=1), np.std([9, 16, 25], ddof=1)])


def test_only_seeds_make_a_table_and_no_plot(tmp_path):
    sweep = load(tmp_path, SWEEP.replace("(1e-3, 1e-2)", "(1e-3,)"))
    for point in sweep.points:
        finish(point, 1.0)
    [row] = report.write(sweep, tmp_path / "out")
    assert (row["joint/val/ema_loss"], row["spread"], row["seeds"]) == (1.0, 0.0, "3 of 3")
    assert not (tmp_path / "out/sweep.png").exists()


def test_a_metric_of_a_stage_that_does_not_run(tmp_path):
    with pytest.raises(ConfigError, match="with a stage that .* runs"):
        load(tmp_path, f'{SWEEP}METRIC = "text_to_image/loss"\n')
