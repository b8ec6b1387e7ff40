"""Goodput: the share of a run's time that goes into training steps, and the speed of those steps."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import jax

KINDS = ("input", "evals", "checkpoint", "compile", "restart")  # of time; the rest is spent in steps


class Result(Protocol):
    """A JAX array. Its computation may still run."""

    def is_ready(self) -> bool:
        """Whether the computation is done."""
        ...


class Ledger:
    """Seconds of a run, restarts included, by kind:

    input        waiting for a batch while the devices are idle
    evals        evaluations, apart from their compilation
    checkpoint   the part of saving that the run waits for
    compile      XLA's compilations, and the first call of each task's step
    restart      initialising and restoring; after a crash, all time since the checkpoint that the run resumes from: the
                 steps that were lost, and the time until the new start
    steps        everything else
    """

    def __init__(self, meta: dict | None = None):
        """`meta`: the value of `state()` in the checkpoint that the run resumes from; None for a new run."""
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.steps, self.tokens, self.flops, self.restarts = 0, 0.0, 0.0, 0
        self._inside: list[float] = []  # for each open `time` block: seconds of inner blocks and compilations
        self._began, self._before = time.time(), 0.0
        if meta:
            self.seconds |= meta["seconds"]
            self.steps, self.tokens, self.flops, self.restarts = (
                meta[name] for name in ("steps", "tokens", "flops", "restarts")
            )
            self._before = meta["total"]
            if not meta["ended"]:
                self.restarts += 1
                lost = max(0.0, self._began - meta["at"])
                self.seconds["restart"] += lost
                self._before += lost
        self._save()

    def count_step(self, flops: float) -> None:
        """Count a step of `flops` FLOP, all devices together."""
        self.steps += 1
        self.flops += flops

    def count_tokens(self, tokens: float) -> None:
        """Add to the tokens that the run has read, padding left out."""
        self.tokens += tokens

    @property
    def total(self) -> float:
        """Seconds since the run began, restarts included."""
        return self._before + time.time() - self._began

    def state(self, ended: bool = False) -> dict:
        """JSON values for the checkpoint that is saved now: seconds, counts and the time of day.

        `ended`: the run ends here. Then the time until the next start is not lost, and is not counted as restart.
        """
        counts = {"steps": self.steps, "tokens": self.tokens, "flops": self.flops, "restarts": self.restarts}
        self._save()
        return {"seconds": dict(self.seconds), "total": self.total, "at": time.time(), "ended": ended, **counts}

    def _save(self) -> None:
        self._saved = self.split(), (self.steps, self.tokens, self.flops)

    def rewind(self) -> None:
        """The run goes back to its last save: later steps do not count, and their time is lost."""
        (saved, counts), now = self._saved, self.split()
        self.steps, self.tokens, self.flops = counts
        self.seconds["restart"] += sum(now[kind] - saved[kind] for kind in ("steps", "input"))
        self.seconds["input"] = saved["input"]

    @contextlib.contextmanager
    def time(self, kind: str) -> Iterator[None]:
        """Count the time of the block as `kind`, one of KINDS. Inner blocks and compilations keep their own kind."""
        begin, _ = time.time(), self._inside.append(0.0)
        try:
            yield
        finally:
            self._spend(kind, time.time() - begin - self._inside.pop(), time.time() - begin)

    def _spend(self, kind: str, own: float, whole: float) -> None:
        self.seconds[kind] += max(0.0, own)
        if self._inside:
            self._inside[-1] += whole

    @contextlib.contextmanager
    def waiting(self, running: Result | None) -> Iterator[None]:
        """Count the time of the block as "input", unless `running`, a result of the last step, is still computed at its
        end.
        """
        begin = time.time()
        yield
        if running is None or running.is_ready():
            self._spend("input", time.time() - begin, time.time() - begin)

    @contextlib.contextmanager
    def noticing_compilations(self) -> Iterator[None]:
        """During the block, count the time of XLA's compilations, wherever they happen, as "compile"."""

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self._spend("compile", duration_secs, duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def split(self) -> dict[str, float]:
        """Seconds so far by kind, "steps" and "total" included."""
        total = self.total
        return {"steps": max(0.0, total - sum(self.seconds.values())), **self.seconds, "total": total}

    def speed(
        self, before: dict[str, float], steps: int, tokens: float, flops: float | None, peak: float | None
    ) -> dict:
        """Rates of the last `steps` steps, see `rates`. `before`: the value of `split()` when they began; `flops`: of
        one step, all devices together; `peak`: FLOP/s of one device."""
        now = self.split()
        spent = {kind: now[kind] - before[kind] for kind in now}
        return rates(spent, steps, tokens, flops * steps if flops else None, peak)

    def summary(self, peak: float | None) -> dict:
        """Counts, seconds and shares by kind of time, and rates of the whole run. `peak`: FLOP/s of one device."""
        spent = self.split()
        whole = spent["total"] or 1.0
        share = {kind: seconds / whole for kind, seconds in spent.items() if kind != "total"}
        counts = {"steps": self.steps, "restarts": self.restarts, "seconds": spent, "share": share}
        return counts | rates(spent, self.steps, self.tokens, self.flops, peak)


def rates(spent: dict[str, float], steps: int, tokens: float, flops: float | None, peak: float | None) -> dict:
    """Step time and input wait (seconds per step), tokens per second and, if `flops` and `peak` are known, the MFU.

    The MFU is `flops`, of all steps, over the FLOP that the devices can do at their peak in the time of steps and
    input. Compilation, saving and restarts are left out.
    """
    training = max(spent["steps"] + spent["input"], 1e-9)
    count = max(steps, 1)
    found = {
        "step_seconds": training / count,
        "input_wait_seconds": spent["input"] / count,
        "tokens_per_second": tokens / training,
    }
    if flops and peak:
        found["mfu"] = flops / (training * peak * jax.device_count())
    return found
