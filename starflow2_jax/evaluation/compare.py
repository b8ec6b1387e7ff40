"""The scores of several runs side by side: means, spreads, and bootstrap intervals over the runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from starflow2_jax.errors import UserError, shown
from starflow2_jax.text_files import read_json_file

NAME = "scores.json"
DRAWS, LEVEL, SEED = 10_000, 0.95, 0


@dataclass(frozen=True)
class Line:
    """A number of several runs. spread: standard deviation over them; interval: of the mean; both None for one run."""

    name: str
    values: tuple[float | None, ...]
    mean: float
    spread: float | None
    interval: tuple[float, float] | None


def read_scores(folder: Path) -> dict[str, float | None]:
    """The numbers of a run: of scores.json in its folder, or in the folder `answers` of its report. Raises UserError."""
    path = next((path for path in (folder / NAME, folder / "answers" / NAME) if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no {NAME}; name the --out of `starflow2 eval`, after its last process has ended")
    values = read_json_file(path)
    if not isinstance(values, Mapping):
        raise UserError(f'{path} is no object of numbers such as {{"accuracy": 0.5}}')
    for name, value in values.items():
        if not (value is None or isinstance(value, int | float) and not isinstance(value, bool)):
            raise UserError(f"{path} has {shown(value)} as {name!r}, which is no number")
    return dict(values)


def compared(runs: Sequence[Mapping[str, float | None]]) -> list[Line]:
    """A line for each number that some run has. Runs that lack it are left out of its mean."""
    lines = []
    for name in dict.fromkeys(name for run in runs for name in run):
        values = tuple(run.get(name) for run in runs)
        there = np.array([value for value in values if value is not None], np.float64)
        if len(there):
            several = len(there) > 1
            spread = float(there.std(ddof=1)) if several else None
            lines.append(Line(name, values, float(there.mean()), spread, interval(there) if several else None))
    return lines


def interval(values: np.ndarray) -> tuple[float, float]:
    """The bootstrap interval (percentiles) of the mean of values (n,). With few runs it is too narrow."""
    drawn = np.random.default_rng(SEED).choice(values, (DRAWS, len(values))).mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def table(names: Sequence[str], lines: Sequence[Line]) -> str:
    """A Markdown table: a row for each number, a column for each run, mean, standard deviation and interval."""
    rows = [["", *names, "mean", "std", f"{LEVEL:.0%} interval"]]
    for line in lines:
        ends = "" if line.interval is None else " to ".join(map(_number, line.interval))
        rows.append([line.name, *map(_number, line.values), _number(line.mean), _number(line.spread), ends])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
