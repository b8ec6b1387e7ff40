"""Prints how a step grows with the number of chips, as a table, and draws it: from kept plans, so nothing is compiled.

    python benchmarks/scaling.py docs/benchmarks/plans/joint_*.json --plot docs/benchmarks/scaling.png

Plans of one stage and one kind of chip make one line of the plot.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {"step, s": "seconds", "MFU, %": "mfu", "peak, GiB": "peak", "sent, GiB": "sent"}


def rows(files: list[str]) -> list[dict]:
    """One row of numbers for each plan in these files, by stage, kind of chip and number of chips."""
    found = []
    for plan in (plan for file in files for plan in json.loads(Path(file).read_text(encoding="utf-8"))):
        stage, chip = plan["what"].split()[-1], plan["topology"].partition(":")[0]
        sent = sum(collective["bytes"] for collective in plan["collectives"])
        found.append(
            dict(stage=stage, chip=chip, chips=plan["chips"], topology=plan["topology"], rows=plan["settings"]["rows"])
            | dict(data=plan["mesh"]["data"], fsdp=plan["mesh"]["fsdp"], seconds=plan["seconds"], mfu=100 * plan["mfu"])
            | dict(waiting=plan["exposed_seconds"], peak=plan["peak"] / 2**30, sent=sent / 2**30)
        )
    return sorted(found, key=lambda row: (row["stage"], row["chip"], row["chips"]))


def table(found: list[dict]) -> str:
    """The rows as a Markdown table."""
    names = (
        "stage",
        "topology",
        "chips",
        "rows",
        "data x fsdp",
        "step, s",
        "waiting, s",
        "MFU, %",
        "peak, GiB",
        "sent, GiB",
    )
    lines = [names, ("---",) * len(names)]
    for r in found:
        numbers = (
            f"{r['seconds']:.3f}",
            f"{r['waiting']:.3f}",
            f"{r['mfu']:.1f}",
            f"{r['peak']:.1f}",
            f"{r['sent']:.1f}",
        )
        sizes = str(r["chips"]), str(r["rows"]), f"{r['data']} x {r['fsdp']}"
        lines.append((r["stage"], r["topology"], *sizes, *numbers))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: list[dict], path: str) -> None:
    """Draw each panel over the number of chips, one line for each stage and kind of chip."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for panel, (title, name) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for stage, chip in sorted({(r["stage"], r["chip"]) for r in found}):
            own = [r for r in found if (r["stage"], r["chip"]) == (stage, chip)]
            panel.plot([r["chips"] for r in own], [r[name] for r in own], "o-", label=f"{stage}, {chip}")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set(title=title, xlabel="chips")
        panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", metavar="FILE", help="plans that `starflow2 plan --json` wrote")
    parser.add_argument("--plot", metavar="FILE", help="draw them into this PNG file")
    args = parser.parse_args()
    found = rows(args.plans)
    print(table(found))
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
