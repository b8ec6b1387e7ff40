"""Plans as text for a terminal."""

import math

from starflow2_jax.planning.plan import Plan


def text(plan: Plan) -> str:
    """A whole plan, several lines."""
    lines = [f"{plan.what} on {plan.topology}, {plan.chips} chips, mesh {_pairs(plan.mesh)}"]
    lines.append(f"  {_pairs(plan.settings)}")
    if not plan.mesh:
        return "\n".join([*lines, *_does_not_fit(plan)])
    lines += ["memory of a chip"]
    lines += [f"  {name:<22}{_size(value):>12}" for name, value in plan.arguments.items()]
    lines += [f"  {'activations, temporary':<22}{_size(plan.temporary):>12}"]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [f"  {'peak':<22}{_size(plan.peak):>12}  of {_size(plan.memory)}: {verdict}"]
    if plan.host:
        lines += [f"  {'and in the host memory':<22}{_size(plan.host):>12}"]
    if plan.whole:
        lines += [f"  {plan.whole}"]
    if not plan.fits:
        lines += _does_not_fit(plan)
    lines += ["FLOP of a chip and step"]
    if plan.flops_by_hand:
        lines += [f"  {name:<22}{_flop(value):>12}" for name, value in plan.flops_by_hand.items()]
        lines += [f"  {'by hand':<22}{_flop(sum(plan.flops_by_hand.values())):>12}  ({plan.rules['flops']})"]
        lines += [
            f"  {'by hand, executed':<22}{_flop(plan.hardware_by_hand):>12}  "
            "(with recomputation, and attention as its kernel computes it)"
        ]
    lines += [f"  {'compiled':<22}{_flop(plan.flops_compiled):>12}"]
    if plan.unknown_loops:
        lines += [f"  {plan.unknown_loops} loops of unknown length are counted as one turn"]
    lines += [f"bytes to and from memory {_size(plan.bytes_moved)}", "collectives of a chip and step"]
    lines += ["  " + line for line in collectives(plan)]
    lines += ["largest arrays", *(f"  {_size(size):>12}  {what[:100]}" for size, what in plan.largest)]
    lines += [
        f"predicted step {plan.seconds:.3g} s (matrix units {plan.matrix_seconds:.3g}, "
        f"memory {plan.memory_seconds:.3g}, waiting for the interconnect {plan.exposed_seconds:.3g})"
    ]
    lines += [f"predicted {plan.tokens_per_second:,.0f} positions a second"]
    if plan.mfu:
        lines[-1] += f", MFU {plan.mfu:.1%}"
    if plan.seconds_a_token:
        lines[-1] += f", {plan.seconds_a_token:.3g} s a token of a row"
    if plan.steps:
        whole = plan.seconds * plan.steps
        lines += [
            f"the stage's {plan.steps:,} steps: {whole / 86400:.3g} days, {whole / 3600 * plan.chips:,.0f} chip-hours"
        ]
    if plan.likely:
        lines += [f"  likely {plan.likely[0]:.3g} to {plan.likely[1]:.3g} s: {plan.rules['margin']}"]
    else:
        lines += [f"  not corrected: {plan.rules['margin']}"]
    lines += [f"  roofline: {plan.rules['roofline']}"]
    return "\n".join(lines)


def collectives(plan: Plan) -> list[str]:
    """A table of the plan's collectives, one line each, a header first."""
    rows = [("kind", "axis", "times", "bytes sent", "seconds", "asynchronous", "hidden")]
    for c in plan.collectives:
        hidden = c["overlapped"] / c["seconds"] if c["seconds"] else 0
        where, count, sent = (c["kind"], c["axis"]), f"{c['count']:.0f}", _size(c["bytes"])
        rows.append((*where, count, sent, f"{c['seconds']:.4f}", f"{c['started']:.0f}", f"{hidden:.0%}"))
    return columns(rows)


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines: the first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _does_not_fit(plan: Plan) -> list[str]:
    needed = "XLA does not tell how much more than" if math.isnan(plan.peak) else f"{_size(plan.peak)} of"
    lines = [f"does not fit: {needed} {_size(plan.memory)}"]
    lines += [f"  {_size(size):>12}  {what[:100]}" for size, what in plan.largest]
    return [*lines, "what to change:", *(f"  {line}" for line in plan.advice)]


def _pairs(values: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in values.items())


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**27 else f"{value / 2**20:.1f} MiB"


def _flop(value: float) -> str:
    return f"{value / 1e12:.3f} T" if value >= 1e10 else f"{value / 1e6:.1f} M"
