"""Comparisons of runs: the table, and intervals over runs and over items against other computations of them."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from starflow2_jax import cli
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.compare import Run, column_names, compared, interval, read_run


def write(folder, scores=None, items=None):
    folder.mkdir(parents=True)
    for name, value in (("scores", scores), ("items", items)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table(tmp_path, capsys):
    write(tmp_path / "one", {"a": 0.5, "b": None}, {"a": {"x": 1, "y": 0}})
    write(tmp_path / "two/answers", {"a": 0.75, "b": 2}, {"a": {"x": [1, 3], "y": [0, 1]}})
    write(tmp_path / "three", {"a": 1.0})
    assert cli.main(["eval", "compare", *(str(tmp_path / name) for name in ("one", "two", "three"))]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[0] == ["", "one", "two", "three", "mean", "std", "95% over runs", "95% over items"]
    assert rows[2] == ["a", "0.5 (0 to 1)", "0.75 (0 to 1)", "1", "0.75", "0.25", "(0.5 to 1)", ""]
    assert rows[3] == ["b", "", "2", "", "2", "", "", ""]
    assert cli.main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert rows_of(capsys.readouterr().out)[2][-1] == "(0 to 1)"


@pytest.mark.parametrize(
    "folders, names",
    [
        (["one", "runs/two"], ["one", "two"]),
        (["."], ["here"]),
        (["a/answers", "b/answers", "c"], ["a/answers", "b/answers", "c"]),
        (["answers", "../answers"], ["here/answers", "root/answers"]),
        (["a", "a"], ["a", "a"]),
    ],
)
def test_columns_are_named_apart(tmp_path, monkeypatch, folders, names):
    here = tmp_path / "root/here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert column_names([Path(folder) for folder in folders]) == names


def ratio(*arrays, axis):
    """The mean over the runs of sums divided by sums of weights, for `scipy.stats.bootstrap` with paired items."""
    return np.mean([a.sum(axis) / b.sum(axis) for a, b in zip(arrays[::2], arrays[1::2], strict=True)], 0)


@pytest.mark.parametrize("runs", [1, 3])
def test_over_items_as_scipy_computes_it(runs):
    rng = np.random.default_rng(1)
    values, weights = rng.gamma(2.0, size=(runs, 300)), rng.integers(1, 30, 300).astype(float)
    values += rng.normal(size=300)  # items are hard or easy for all runs, so the runs' means vary together
    items = [{str(i): (v, w) for i, (v, w) in enumerate(zip(each, weights, strict=True))} for each in values]
    shuffled = [dict(reversed(each.items())) for each in items[1:]]  # items go by their keys
    data = [array for each in values for array in (each * weights, weights)]
    want = stats.bootstrap(data, ratio, paired=True, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    low, high = interval([items[0], *shuffled])
    np.testing.assert_allclose((low, high), want, atol=0.06 * (want.high - want.low))
    line = [compared([Run({"x": 1.0}, {"x": each}) for each in items])][0][0]
    assert line.over_items == pytest.approx((low, high), abs=0.1 * (high - low)) and None not in line.own


def test_many_items_have_the_normal_interval():
    right = np.random.default_rng(3).random(2500) < 0.3
    low, high = interval([{str(i): (float(x), 1.0) for i, x in enumerate(right)}])
    half = 1.96 * right.std() / 50
    np.testing.assert_allclose((low, high), (right.mean() - half, right.mean() + half), atol=0.05 * half)


def test_over_runs_by_all_draws():
    values = np.array([0.1, 0.4, 0.45, 0.9])
    means = np.sort([np.mean(drawn) for drawn in product(values, repeat=4)])  # the whole bootstrap distribution
    low, high = interval([{str(i): (value, 1.0) for i, value in enumerate(values)}])
    assert np.mean(means < low - 1e-9) <= 0.03 <= np.mean(means <= low + 0.02)
    assert np.mean(means > high + 1e-9) <= 0.03 <= np.mean(means >= high - 0.02)
    [line] = compared([Run({"x": float(value)}) for value in values])
    assert (
        line.over_runs == (low, high) and line.over_items is None and line.spread == pytest.approx(values.std(ddof=1))
    )


def test_what_is_not_known_has_no_interval():
    a, b = {"1": (1.0, 1.0), "2": (0.0, 1.0)}, {"1": (1.0, 1.0), "3": (0.0, 1.0)}
    assert interval([a, b]) is None and interval([a, None]) is None  # other questions, or unknown ones
    assert interval([{"1": (1.0, 1.0)}]) is None and interval([{}]) is None
    assert interval([{str(i): (1.0, 1.0) for i in range(9)}]) == (1.0, 1.0)
    [line] = compared([Run({"x": 0.5}, {"x": a}), Run({"x": 0.5}, {"x": b})])
    assert line.over_items is None and None not in line.own


def test_items_alone_are_enough(tmp_path):
    found = read_run(write(tmp_path / "mine", None, {"overall": {"a": [0.5, 3], "b": 0}}))
    assert found.numbers == {"overall": 0.375} and found.items == {"overall": {"a": (0.5, 3.0), "b": (0.0, 1.0)}}


@pytest.mark.parametrize(
    "scores, items, said",
    [
        ({"a": "good"}, None, "scores.json: the value of 'a' must be a number, not 'good'"),
        ([1], None, "scores.json is no object"),
        (None, [1], "items.json is no object"),
        (None, {"a": [1]}, "items.json, 'a', is no object"),
        (None, {"a": {"x": "1"}}, "the value of 'x' must be a number"),
        (None, {"a": {"x": [1, 0]}}, "weight above 0"),
        (None, {"a": {"x": [1, 2, 3]}}, "weight above 0"),
        (None, None, "has no scores.json; name the --out"),
    ],
)
def test_other_files_are_refused(tmp_path, scores, items, said):
    with pytest.raises(UserError, match=said):
        read_run(write(tmp_path / "run", scores, items))
