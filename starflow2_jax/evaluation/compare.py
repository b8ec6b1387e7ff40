"""The scores of several runs side by side: means, spreads, and bootstrap intervals over the runs and over the items.

A run's folder, or the folder `answers` in it, has scores.json, {name: number}, or items.json, {name: {key: value or
[value, weight]}}: the items, such as questions, that a number is the mean of. `starflow2 eval` writes both.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from starflow2_jax.errors import UserError, shown
from starflow2_jax.evaluation.protocol import Items, numbers
from starflow2_jax.text_files import read_json_file

SCORES, ITEMS = "scores.json", "items.json"
DRAWS, LEVEL, SEED = 10_000, 0.95, 0
TOGETHER = 10**6  # values that are drawn at a time
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Run:
    """The numbers of a run by name, and the items of those that have some."""

    numbers: Mapping[str, float | None]
    items: Mapping[str, Items] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A number of several runs. All intervals are bootstrap intervals, and None where too little is known.

    own: of each run's value, over its items. spread: standard deviation over the runs; None for one run. over_runs,
    over_items: of the mean, over the runs and over the items, which must be the same in all runs.
    """

    name: str
    values: tuple[float | None, ...]
    own: tuple[Interval | None, ...]
    mean: float
    spread: float | None
    over_runs: Interval | None
    over_items: Interval | None


def read_run(folder: Path) -> Run:
    """The numbers and items in the folder of a run, or in the folder `answers` of its report. Raises UserError."""
    places = [place for place in (folder, folder / "answers") if any((place / n).is_file() for n in (SCORES, ITEMS))]
    if not places:
        raise UserError(
            f"{folder} has no {SCORES}; name the --out of `starflow2 eval`, after its last process has ended"
        )
    scores, listed = (places[0] / name for name in (SCORES, ITEMS))
    items = _read_items(listed) if listed.is_file() else {}
    found = _object(scores, read_json_file(scores), '{"accuracy": 0.5}') if scores.is_file() else {}
    for name, value in found.items():
        if not (value is None or _is_number(value)):
            raise UserError(f"{scores}: the value of {name!r} must be a number, not {shown(value)}")
    return Run(numbers(items) | found, items)


def _read_items(path: Path) -> dict[str, Items]:
    example = '{"accuracy": {"question 1": 1, "question 2": 0}}'
    found: dict[str, Items] = {}
    for name, values in _object(path, read_json_file(path), example).items():
        found[name] = {}
        for key, value in _object(f"{path}, {name!r},", values, example).items():
            pair = value if isinstance(value, list) else [value, 1]
            if not (len(pair) == 2 and all(map(_is_number, pair)) and pair[1] > 0):
                raise UserError(
                    f"{path}: the value of {key!r} must be a number, or [number, weight above 0], not {shown(value)}"
                )
            found[name][key] = (float(pair[0]), float(pair[1]))
    return found


def _object(place: object, value: object, example: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place} is no object such as {example}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def column_names(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each folder's absolute path that no other folder of them has, such as `a/answers`."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        ends = (path[i:] for i in reversed(range(len(path))))
        names.append(str(Path(*next(end for end in ends if all(other[-len(end) :] != end for other in others)))))
    return names


def compared(runs: Sequence[Run]) -> list[Line]:
    """A line for each number that some run has. Runs that lack it are left out of its mean."""
    lines = []
    for name in dict.fromkeys(name for run in runs for name in run.numbers):
        values = tuple(run.numbers.get(name) for run in runs)
        there = np.array([value for value in values if value is not None], np.float64)
        if not len(there):
            continue
        items = [run.items.get(name) for run in runs]
        known = [each for each, value in zip(items, values, strict=True) if value is not None]
        line = Line(
            name,
            values,
            own=tuple(interval([each]) for each in items),
            mean=float(there.mean()),
            spread=float(there.std(ddof=1)) if len(there) > 1 else None,
            over_runs=interval([{str(i): (value, 1.0) for i, value in enumerate(there)}]),
            over_items=interval(known),
        )
        lines.append(line)
    return lines


def interval(runs: Sequence[Items | None]) -> Interval | None:
    """The bootstrap interval (percentiles) of the runs' mean, if the items are drawn again, the same for all runs.

    None if the runs have other items, or fewer than two. With few items, the interval is too narrow.
    """
    keys = list(runs[0] or ())
    if len(keys) < 2 or any(each is None or each.keys() != set(keys) for each in runs):
        return None
    pairs = np.array([[each[key] for key in keys] for each in runs if each])
    weights, weighted = pairs[..., 1], pairs.prod(-1)  # (runs, items)
    found = stats.bootstrap(
        (np.arange(len(keys)),),
        lambda drawn, axis: (weighted[:, drawn].sum(axis) / weights[:, drawn].sum(axis)).mean(0),
        vectorized=True,
        n_resamples=DRAWS,
        batch=max(TOGETHER // pairs.size, 1),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def table(names: Sequence[str], lines: Sequence[Line]) -> str:
    """A Markdown table: a row for each number, a column for each run, mean, standard deviation and intervals."""
    rows = [["", *names, "mean", "std", f"{LEVEL:.0%} over runs", f"{LEVEL:.0%} over items"]]
    for line in lines:
        cells = [f"{_number(value)} {_ends(own)}".strip() for value, own in zip(line.values, line.own, strict=True)]
        rows.append(
            [line.name, *cells, _number(line.mean), _number(line.spread), _ends(line.over_runs), _ends(line.over_items)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ends(ends: Interval | None) -> str:
    return "" if ends is None else f"({_number(ends[0])} to {_number(ends[1])})"
