"""Calibration: measures which chunk and which guess invert each block of both flows fastest (arXiv 2505.12849)."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from starflow2_jax.data.documents import Document
from starflow2_jax.models.flow import NO_CONTEXT, Context, Flow, Guide
from starflow2_jax.models.jacobi import GUESSES, SEQUENTIAL, Jacobi, Schedule
from starflow2_jax.models.pretzel import apply
from starflow2_jax.sampling import inversion
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions

RUNS = 3  # timed runs after the one that compiles; their median counts


class Conditions(struct.PyTreeNode):
    """The conditions under which the flow is inverted: the arguments of Flow.inverse."""

    context: Context = NO_CONTEXT
    unconditional: Context | None = None
    guide: Guide | None = struct.field(pytree_node=False, default=None)
    temperature: float = 1.0


UNCONDITIONAL = Conditions()


@dataclass(frozen=True)
class Measurement:
    """What one solver needed on one block. A pass is a run of the network over a chunk."""

    solver: Jacobi
    passes: int  # the passes of each chunk's slowest row, summed over chunks; deep flow: all passes of the slowest row
    seconds: float  # time of the compiled inverse
    error: float  # mean squared difference from token by token / mean square, of the worst row


def candidates(tokens: int, tolerance: float) -> Iterator[Jacobi]:
    """Token by token first; then chunks of 2, 4, 8, ... and all tokens, each with every guess."""
    yield Jacobi(1, tolerance)
    for chunk in [c for k in range(1, tokens.bit_length()) if (c := 2**k) < tokens] + [tokens]:
        yield from (Jacobi(chunk, tolerance, guess) for guess in GUESSES if chunk > 1)


def calibrate(
    flow: Flow, params: dict, z: jax.Array, tolerance: float = 1e-3, conditions: Conditions = UNCONDITIONAL
) -> list[list[Measurement]]:
    """Measure every candidate on every block of the chain. Returns a list for each block; decoding token by token is
    its first entry.

    Each block inverts the exact output of the block before it. `params` are the flow's. z (B, N, D) is the chain's
    input; choose the batch size B that you sample with, because a chunk takes as long as its slowest row.
    """
    measured = []
    for i, cfg in reversed(list(enumerate(flow.blocks))):
        block, own = Flow((cfg,)), {"block_0": params[f"block_{i}"]}
        invert = partial(_measure, block, own, z, conditions)
        z, *_ = exact = invert((SEQUENTIAL,))
        rows = []
        for solver in candidates(z.shape[1], tolerance):
            h, passes, seconds = exact if solver.chunk == 1 else invert((solver,))
            rows.append(Measurement(solver, passes[0], seconds, relative_error(h, z)))
        measured.insert(0, rows)
    return measured


def fastest(measured: list[Measurement], tolerance: float) -> Measurement:
    """The fastest candidate with an error of at most `tolerance`; token by token, the first, always qualifies."""
    return min([measured[0], *(m for m in measured if m.error <= tolerance)], key=lambda m: m.seconds)


def relative_error(h: ArrayLike, exact: ArrayLike) -> float:
    """The worst row's mean((h - exact)^2) / mean(exact^2)."""
    h, exact = np.asarray(h), np.asarray(exact)
    error = np.mean((h - exact) ** 2, (1, 2)) / np.maximum(np.mean(exact**2, (1, 2)), np.finfo(h.dtype).tiny)
    return float(np.max(error))


def _measure(
    flow: Flow, params: dict, z: jax.Array, conditions: Conditions, schedule: Schedule
) -> tuple[jax.Array, list[int], float]:
    """Invert RUNS times: h (B, N, D), the passes of each block, and the median seconds of the compiled inverse."""
    times = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        h, sown = jax.block_until_ready(_invert(flow, schedule, params, z, conditions))
        times.append(time.perf_counter() - begin)
    passes = [int(np.asarray(sown[f"block_{i}"]["passes"]).max(0).sum()) for i in range(len(flow.blocks))]
    return h, passes, statistics.median(times[1:])


@partial(jax.jit, static_argnums=(0, 1))
def _invert(
    flow: Flow, schedule: Schedule, params: dict, z: jax.Array, given: Conditions
) -> tuple[jax.Array, dict[str, Any]]:
    """The inverse and what Flow.inverse sows, by block."""
    arguments = (z, given.context, given.unconditional, given.guide, given.temperature, schedule)
    h, sown = apply(flow, params, *arguments, method=Flow.inverse, mutable="inversion")
    return h, sown["inversion"]


def calibrate_deep(
    sampler: Sampler, prompts: list[Document], guidance: float = 1.0, tolerance: float = 1e-3, batch: int = 16
) -> tuple[list[Measurement], np.ndarray]:
    """Measure the deep flow while the sampler draws images: all candidates, and the exact u (batch, N, D).

    The prompts are used in turn. Both streams run, as in sampling. Candidates differ in their chunk alone: the sampler
    has a guess of its own, the noise under the Gaussian of the chunk's first token.
    """
    N = sampler.model.cfg.tokens
    measured: list[Measurement] = []
    exact = np.zeros(0)  # set by the first candidate, which is token by token
    for solver in (s for s in candidates(N, tolerance) if s.guess == SEQUENTIAL.guess):
        options = SampleOptions(
            guidance=guidance, max_tokens=N + 1, image_first=True, jacobi=solver.chunk, tolerance=tolerance
        )
        times = []
        for _ in range(RUNS + 1):
            session = sampler.session(options, range(batch))
            session.read([prompts[i % len(prompts)] for i in range(batch)], room=N + 1)
            before = np.asarray(session.rows.passes)
            begin = time.perf_counter()
            for _ in session.advance(every=None):
                pass
            times.append(time.perf_counter() - begin)
        u = np.asarray(session.rows.u)[:batch, 1 : N + 1]
        exact = exact if measured else u
        passes = int(np.max((session.rows.passes - before)[:batch])) - 1  # without the pass of <|vision_start|>
        measured.append(Measurement(solver, passes, statistics.median(times[1:]), relative_error(u, exact)))
    return measured, exact


def calibrate_checkpoint(
    sampler: Sampler,
    folder: str | Path,
    prompts: list[Document],
    guidance: float = 1.0,
    tolerance: float = 1e-3,
    batch: int = 16,
) -> dict:
    """Calibrate both flows on `batch` images that the model of `folder` draws, and write inversion.json there.

    Returns the content of the file: for each block the fastest solver with its passes, seconds and error, and all
    candidates (the deep flow is the last block); for the whole shallow flow the seconds and the error. Raises
    DocumentError for a prompt that does not fit the model.
    """
    with jax.set_mesh(sampler.mesh):
        report = _calibrated(sampler, prompts, guidance, tolerance, batch)
    inversion.write(Path(folder), report)
    return report


def _calibrated(sampler: Sampler, prompts: list[Document], guidance: float, tolerance: float, batch: int) -> dict:
    """The content of inversion.json, measured on the mesh of `jax.set_mesh`."""
    flow, params = Flow(sampler.model.cfg.shallow_chain), sampler.params.get("shallow", {})
    deep, u = calibrate_deep(sampler, prompts, guidance, tolerance, batch)
    u = jnp.asarray(u)
    measured = calibrate(flow, params, u, tolerance)
    chosen = [fastest(m, tolerance) for m in measured]
    exact, _, sequential_seconds = _measure(flow, params, u, UNCONDITIONAL, (SEQUENTIAL,) * len(chosen))
    h, _, seconds = _measure(flow, params, u, UNCONDITIONAL, tuple(m.solver for m in chosen))
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "step": sampler.step,
        "batch": batch,
        "guidance": guidance,
        "tolerance": tolerance,
        "seconds": seconds,
        "sequential_seconds": sequential_seconds,
        "error": relative_error(h, exact),
        "blocks": [
            {**asdict(best), "candidates": [asdict(m) for m in rows]}
            for best, rows in zip([*chosen, fastest(deep, tolerance)], [*measured, deep], strict=True)
        ],
    }


def table(report: dict) -> str:
    """The result of `calibrate_checkpoint` as a table for the terminal."""
    lines = ["block    chunk  guess     passes        ms  token by token  error"]
    names = [*map(str, range(len(report["blocks"]) - 1)), "deep"]
    for name, block in zip(names, report["blocks"], strict=True):
        solver, first = block["solver"], block["candidates"][0]
        lines.append(
            f"{name:>7s}  {solver['chunk']:5d}  {solver['guess'] if solver['chunk'] > 1 else '-':8s}  "
            f"{block['passes']:6d}  {1e3 * block['seconds']:8.2f}  {1e3 * first['seconds']:14.2f}  {block['error']:.1e}"
        )
    lines.append(
        f"shallow flow {1e3 * report['seconds']:27.2f}  {1e3 * report['sequential_seconds']:14.2f}  "
        f"{report['error']:.1e}"
    )
    return "\n".join(lines)
