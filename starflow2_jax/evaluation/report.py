"""The report of an evaluation: report.json, samples.png, and index.html, a page that needs no other file."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.images import as_pillow
from starflow2_jax.evaluation.protocol import Page

ZOOM, MARGIN = 8, 4  # samples.png enlarges each pixel ZOOM times and leaves MARGIN pixels between images
SHOWN = 10  # largest number of images in a row of the page's grid
LOWER_IS_BETTER = ("nll", "seconds")  # for keys that hold one of these; for all others, higher is better
UNITS = {"image_loss": "nats per latent dimension", "text_loss": "nats per token"}
INK, LINE = "#808080", "#3b82c4"  # readable on light and on dark

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #66717e; --page: #fbfbf9; --card: #fff; --line: #dfe2e6;
  --made: #b4560b; --tint: #fdf0e3; --good: #1c7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a2ae; --page: #15181c; --card: #1d2126;
  --line: #353b43; --made: #f0a35e; --tint: #3a2c1d; --good: #6fce97; --bad: #f28b82; } }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 56rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.8rem; } h2 { margin: 2.5rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: 0 0 .5rem; font-size: .9rem; font-weight: 600; color: var(--soft); } p { max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem 1.6rem .3rem 0; border-bottom: 1px solid var(--line);
  text-align: left; font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 600; font-size: .9rem; }
td.number, th.number { text-align: right; } .met { color: var(--good); } .missed { color: var(--bad); }
.curves { width: 100%; height: auto; } img.pixels { image-rendering: pixelated; vertical-align: middle; }
.grid td, .grid th { padding: 2px; border: 0; } .grid th { padding-right: .8rem; text-align: right; }
.grid img { width: 40px; height: 40px; display: block; }
.example { margin: .8rem 0; padding: .9rem 1.1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); line-height: 4.6; white-space: pre-wrap; } .example h3 { line-height: 1.4; }
.example img { width: 64px; height: 64px; border: 3px solid transparent; border-radius: 4px; margin: 0 .15rem; }
span.token { border-left: 1px dotted var(--soft); }
img.made, .example img.made { border: 3px solid var(--made); border-radius: 4px; }
span.made { padding: .15em .1em; background: var(--tint); color: var(--made); border-bottom: 2px solid var(--made); }
"""


def write_report(folder: Path, report: dict, page: Page | None, metrics_path: Path) -> None:
    """Write report.json and index.html into `folder`, and samples.png if there is a page.

    report: numbers by name, in groups that may nest; "aims" holds the value that a number should reach, for some of the
    numbers, and "a.b" there names number b of group a. metrics_path: the training's metrics.jsonl; without that file
    the page shows no curves.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(report, indent=1, default=lambda array: array.tolist()) + "\n")
    sections, about = [("Numbers", _numbers(report))], ""
    if page is not None:
        as_pillow(contact_sheet(page.grid)).save(folder / "samples.png")
        sections += [(page.title, _grid(page)), ("Worked examples", _examples(page.examples))]
        about = f"<p>{escape(page.about)}</p>\n"
    sections.append(("Training", _training(read_metrics(metrics_path))))
    body = "".join(f"<h2>{escape(title)}</h2>\n{content}\n" for title, content in sections)
    write_whole(folder / "index.html", html_page("STARFlow2 report", about + body))


def html_page(title: str, body: str) -> str:
    """A whole page, readable on light and on dark screens. body: HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def contact_sheet(grid: np.ndarray) -> np.ndarray:
    """Images (rows, columns, height, width, C) -> one image of all, enlarged ZOOM times, with gray margins."""
    large = grid.repeat(ZOOM, axis=2).repeat(ZOOM, axis=3)
    large = np.pad(large, ((0, 0), (0, 0), (MARGIN, 0), (MARGIN, 0), (0, 0)))
    rows, columns, height, width, channels = large.shape
    sheet = large.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return np.pad(sheet, ((0, MARGIN), (0, MARGIN), (0, 0)))


def read_metrics(path: Path) -> dict[tuple[str, str], dict[int, float]]:
    """The losses in metrics.jsonl as {(stage, loss): {step: value}}; empty if there is no such file."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    if not Path(path).is_file():
        return curves
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            for name in UNITS:
                if name in values:
                    curves.setdefault((values["stage"], name), {})[values["step"]] = values[name]
        except (ValueError, TypeError, KeyError):  # a line that is damaged, or was cut off when the training was killed
            continue
    return curves


def is_met(key: str, value: float, aim: float) -> bool:
    """Whether a number reaches its aim; the key says whether lower or higher is better."""
    return value <= aim if any(word in key for word in LOWER_IS_BETTER) else value >= aim


def _flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested groups -> {"group.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _numbers(report: Mapping) -> str:
    """The table of numbers, their aims, and whether they reach them."""
    measured = _flat({key: value for key, value in report.items() if key != "aims"})
    aims = _flat(report.get("aims", {}))
    rows = []
    for key in [*measured, *(key for key in aims if key not in measured)]:
        value, aim, verdict = measured.get(key), aims.get(key), ""
        if aim is not None and value is not None:
            met = is_met(key, value, aim)
            verdict = f'<span class="{"met" if met else "missed"}">{"✓ met" if met else "✗ missed"}</span>'
        elif aim is not None:
            verdict = "not measured"
        bound = "" if aim is None else ("≤ " if any(word in key for word in LOWER_IS_BETTER) else "≥ ") + _number(aim)
        name = escape(key.replace("_", " ").replace(".", ": "))
        cells = (f'<td class="number">{cell}</td>' for cell in (_number(value), bound))
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}<td>{verdict}</td></tr>")
    head = '<tr><th>what</th><th class="number">measured</th><th class="number">aim</th><th></th></tr>'
    return f'<div class="wide"><table>\n{head}\n' + "\n".join(rows) + "\n</table></div>"


def _number(value: object) -> str:
    """A number, or any other value, as the text of a cell."""
    if value is None:
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(str(value))


def _grid(page: Page) -> str:
    """The table of generated images."""
    rows = []
    for name, images in zip(page.names, page.grid, strict=True):
        cells = "".join(f"<td>{image_element(image, f'generated {name}')}</td>" for image in images[:SHOWN])
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return (
        f'<p class="soft">{escape(page.note)}</p>\n'
        '<div class="wide"><table class="grid">\n' + "\n".join(rows) + "\n</table></div>"
    )


def _examples(examples: Sequence[tuple[str, Sequence[Text | Image]]]) -> str:
    """The example documents, with the model's parts marked."""
    blocks = [
        f'<div class="example"><h3>{escape(title)}</h3>{"".join(_part(part) for part in parts)}</div>'
        for title, parts in examples
    ]
    return (
        '<p class="soft">Documents of text and images. Text that the model wrote is '
        '<span class="made">marked like this</span>; images that it drew have a frame of that colour.</p>\n'
        + "\n".join(blocks)
    )


def _part(part: Text | Image) -> str:
    """A part of a document, marked if the model made it."""
    if isinstance(part, Image):
        return image_element(part.pixels, "generated image" if part.generate else "given image", part.generate)
    text = escape(part.text)
    return f'<span class="made">{text}</span>' if part.predict else text


def image_element(pixels: np.ndarray, alt: str, made: bool = False) -> str:
    """An image element that holds its PNG; `made`: with the frame of the model's images."""
    file = io.BytesIO()
    as_pillow(np.asarray(pixels)).save(file, "png")
    kind = "pixels made" if made else "pixels"
    return f'<img class="{kind}" alt="{escape(alt)}" title="{escape(alt)}" src="{_data_url(file)}">'


def _data_url(png: io.BytesIO) -> str:
    """A PNG as a data: address."""
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _training(curves: Mapping[tuple[str, str], Mapping[int, float]]) -> str:
    """The training curves, or a sentence if there are none."""
    if not curves:
        return '<p class="soft">No metrics of the training were found.</p>'
    file = io.BytesIO()
    draw_curves(curves).savefig(file, format="png", dpi=160, transparent=True)
    return (
        f'<img class="curves" alt="training curves, a panel for each loss of each stage" src="{_data_url(file)}">\n'
        '<p class="soft">Losses on training batches over the steps of the whole run.</p>'
    )


def draw_curves(curves: Mapping[tuple[str, str], Mapping[int, float]]) -> Figure:
    """A figure with a panel for each curve of `read_metrics`."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(9, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, ((stage, name), curve) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, panel)
        steps = sorted(curve)
        axes.plot(steps, [curve[step] for step in steps], color=LINE, linewidth=1.2)
        axes.set_title(f"{stage}: {name}".replace("_", " "), fontsize=9, color=INK)
        axes.set_ylabel(UNITS[name], fontsize=8, color=INK)
        axes.set_xlabel("step", fontsize=8, color=INK)
        axes.tick_params(labelsize=8, colors=INK)
        axes.grid(color=INK, alpha=0.25, linewidth=0.6)
        axes.spines[:].set_visible(False)
    return figure
