"""Finds the most expensive operations of a compiled program in a trace of the JAX profiler."""

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

STEPS = 3  # traced steps
TOP = 10  # kinds of operations that are listed


def top_operations(run: Callable[[], object], folder: Path) -> list[dict]:
    """Trace STEPS calls of `run` into `folder` (for xprof) and sum up the operations, the most expensive first.

    Operations of one kind (fusion.1, fusion.2) are added up. Milliseconds are per step, summed over all devices.
    """
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            run()
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    return summed(jax.profiler.ProfileData.from_file(str(files[-1]))) if files else []


def summed(data: Any) -> list[dict]:  # of a jax.profiler.ProfileData
    """The TOP most expensive kinds of operations in a trace of STEPS steps. A loop counts through the operations in its
    body only.
    """
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                name = next((str(value) for key, value in event.stats if key == "hlo_op"), "")
                kind = re.sub(r"[.\d]+$", "", name)
                if kind and not kind.startswith(("while", "call", "conditional", "jit_")):
                    total[kind] += event.duration_ns
                    count[kind] += 1
    whole = sum(total.values())
    top = sorted(total, key=total.__getitem__, reverse=True)[:TOP]
    return [
        {"operation": k, "milliseconds": total[k] / STEPS / 1e6, "share": total[k] / whole, "calls": count[k] // STEPS}
        for k in top
    ]
