"""The results of a sweep: a table (Markdown, CSV, JSON), and a plot of the metric against each key that varies."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from starflow2_jax.sweeps.points import DONE, FAILED, SEED, Sweep

FILES = ("sweep.md", "sweep.csv", "sweep.json", "sweep.png")


def write(sweep: Sweep, folder: str | Path) -> list[dict]:
    """Write FILES into `folder`; the plot only if a point is done. Returns the table: a row for each point, or, if the
    sweep varies the seed, for each group of points that differ in their seed alone (see `over_seeds`).

    The rows are sorted by the metric, the best first, and points without a result last. A point's row has its values,
    its metric (None: no result), "state" and "folder".
    """
    folder = Path(folder)
    points = [
        {
            **{name: point.overrides.get(key) for key, name in sweep.varied.items()},
            sweep.metric: sweep.result(point),
            "state": f"{FAILED}: {point.failure}" if point.state == FAILED else point.state,
            "folder": point.folder.name,
        }
        for point in sweep.points
    ]
    names = [name for key, name in sweep.varied.items() if key != SEED]
    rows = points if len(names) == len(sweep.varied) else over_seeds(points, names, sweep.metric)
    for table in (points, rows):
        table.sort(key=lambda row: (row[sweep.metric] is None, row[sweep.metric] or 0.0))
    found = {"config": sweep.config.name, "metric": sweep.metric, "points": points}
    found |= {} if rows is points else {"means": rows}
    (folder / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(points[0]))
        writer.writeheader()
        writer.writerows(points)
    (folder / "sweep.md").write_text(markdown(rows), encoding="utf-8")
    done = [row for row in rows if row[sweep.metric] is not None]
    if done and names:
        _plot(done, names, sweep.metric, folder / "sweep.png")
    return rows


def over_seeds(points: Sequence[dict], names: Sequence[str], metric: str) -> list[dict]:
    """One row for all points that differ only in their seed: the mean of the metric over those that are done, its
    standard deviation ("spread"; None for fewer than two), the number of them, and the state of the least advanced
    point.
    """
    members: dict[str, list[dict]] = {}
    for point in points:
        members.setdefault(repr([point[name] for name in names]), []).append(point)
    rows = []
    for group in members.values():
        values = [point[metric] for point in group if point[metric] is not None]
        rows.append(
            {
                **{name: group[0][name] for name in names},
                metric: float(np.mean(values)) if values else None,
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "seeds": f"{len(values)} of {len(group)}",
                "state": next((point["state"] for point in group if point["state"] != DONE), DONE),
            }
        )
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """The rows of a table, which have the same keys, as a Markdown table."""

    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plot(rows: Sequence[dict], names: Sequence[str], metric: str, path: Path) -> None:
    """Plot the metric in one panel for each key of `names`, with bars for the spread over seeds. If there are two keys,
    points with equal values of the other one are joined by a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=True):
        others = [n for n in names if n != name]
        groups = {}
        for row in rows:
            groups.setdefault(str(row[others[0]]) if len(others) == 1 else "", []).append(row)
        for label, members in sorted(groups.items()):
            members = sorted(members, key=lambda row: row[name] if _numeric(rows, name) else str(row[name]))
            xs = [row[name] if _numeric(rows, name) else str(row[name]) for row in members]
            style = "o-" if len(others) == 1 else "o"
            spread = [r.get("spread") or 0.0 for r in members] if "spread" in members[0] else None
            label = f"{others[0]} {label}" if label else None
            panel.errorbar(xs, [r[metric] for r in members], spread, fmt=style, label=label, capsize=3)
        if spans_decades([row[name] for row in rows]):
            panel.set_xscale("log")
            if len(values := sorted({row[name] for row in rows})) <= 6:  # the values themselves, not powers of ten
                panel.set_xticks(values, [f"{v:g}" for v in values])
                panel.minorticks_off()
        if any(groups):
            panel.legend(fontsize=8)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(metric)
    figure.savefig(path, dpi=110)


def _numeric(rows: Sequence[dict], name: str) -> bool:
    """Whether all values of a column are numbers."""
    return all(isinstance(row[name], int | float) and not isinstance(row[name], bool) for row in rows)


def spans_decades(values: Sequence) -> bool:
    """Whether values need a logarithmic axis: positive numbers, of which the largest is ten times the smallest or
    more.
    """
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numbers and min(values) > 0 and max(values) >= 10 * min(values)
