"""A run of one task: it reads batches, steps, checks the metrics, logs and saves. It handles bad steps and
preemption.
"""

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import jax
import numpy as np
from tqdm import tqdm

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.config.schema import FaultsConfig
from starflow2_jax.parallel import sharding
from starflow2_jax.training.evals.protocol import Evaluation
from starflow2_jax.training.faults import Watch
from starflow2_jax.training.goodput import Ledger
from starflow2_jax.training.metrics import Metrics
from starflow2_jax.training.preemption import Preempted, Preemption
from starflow2_jax.training.profiling import Profiler
from starflow2_jax.training.task import S, Task, groups


@dataclass(frozen=True)
class Settings:
    """How often a run logs and saves, and its policy for bad steps."""

    log_every: int  # steps; 0: never
    save_every: int  # steps; 0: only at the end of a task
    faults: FaultsConfig = FaultsConfig()
    peak_flops: float | None = None  # of one device, for the MFU


@dataclass(frozen=True)
class Tools:
    """The objects that all tasks of a run share."""

    metrics: Metrics
    bar: tqdm
    ledger: Ledger
    preemption: Preemption
    profiler: Profiler


class Run(Generic[S]):
    """One task in progress, resumed from the newest checkpoint.

    `place`: index of the task in the order. `first`: number of steps of the tasks before it. Steps are counted over all
    tasks, so the task's first step has the number first + 1. `best`: the metric by which steps are ranked, one of a
    step or of an evaluation ("NAME/NUMBER").
    """

    def __init__(
        self,
        task: Task[S],
        place: int,
        first: int,
        checkpoints: CheckpointDirectory,
        mesh: jax.sharding.Mesh,
        settings: Settings,
        tools: Tools,
        evals: Sequence[Evaluation] = (),
        best: str = "loss",
    ):
        self.task, self.place, self.first = task, place, first
        self.checkpoints, self.settings, self.tools = checkpoints, settings, tools
        self.evals, self.best = evals, best
        latest = checkpoints.steps.latest()
        meta = checkpoints.steps.meta(latest) if latest else {}
        watched = dict(meta.get("watch", {}))
        if meta.get("stage") != task.name:
            watched.pop("losses", None)  # another task's losses cannot be compared
        with tools.ledger.time("restart"):
            self.state, position = restore(task, checkpoints, mesh)
            self.number = first + int(self.state.step)  # of the last step that is done
            self.frozen = task.frozen(checkpoints)
            self.reader, self.layout = task.batches(), sharding.batch_sharding(mesh)
            if position is not None:
                self._compare_documents(meta.get("documents"))
                self.reader.set_state(position)
            self.step = task.step()
        self.mesh, self.flops = mesh, task.flops
        self.watch = Watch(settings.faults, watched)
        self.pending: deque[tuple[int, dict]] = deque()  # numbers and metrics of steps that are not judged yet
        self.seen: dict[str, float] = {}  # metrics of the last step that was judged
        self.since_log = (tools.ledger.split(), tools.ledger.tokens)  # at the last log
        self.recent: list[float] = []  # values of `best` since the last save
        # Whether the step that the run resumes from was saved before its evaluations were done.
        self.owed = meta.get("stage") == task.name and meta.get("owed", False)
        self.unranked = False  # a step was saved without a value of `best`
        self.called = False  # the step function, which compiles when it is called first
        self.read: dict[str, int] = {}  # counts of documents, at the last check

    def run(self, last: int, stop_at: int | None) -> bool:
        """Train up to step `last`, or to `stop_at` if that comes first. Returns False if it stopped at `stop_at`.

        Raises Preempted, NonFiniteLoss or LossSpike.
        """
        tools, settings = self.tools, self.settings
        tools.bar.update(self.number - self.first)
        logged = self.number
        if self.owed:
            self._evaluate(last)
        while self.number < last:
            self._step()
            number = self.number
            ending = tools.preemption.reached(number)
            saves = number < last and (_due(settings.save_every, number) or number == stop_at or ending)
            logs = _due(settings.log_every, number) or (number == last and settings.log_every > 0)
            looks = any(each.due(number, last) for each in self.evals)
            if not self._judge(0 if saves or logs or looks else 1):
                logged = self.number
                continue
            if saves or logs or _due(CHECKED if jax.process_count() > 1 else 1, number):
                self.read = self.reader.check()
            if logs:
                self._log(number - logged)
                logged = number
            tools.bar.update()
            self.owed = looks and ending and number < last  # the machine may be taken away before they are done
            if looks and not self.owed:
                self._evaluate(last)
            if saves:
                with tools.ledger.time("checkpoint"):
                    self.save(self.state, self.reader.get_state(), ended=number == stop_at)
            if ending and number < last:
                raise Preempted
            if number == stop_at and number < last:
                return False
        return True

    @property
    def faults(self) -> dict[str, int]:
        """Counts of the bad steps of all tasks so far, and of the actions; see `faults.Watch`."""
        return self.watch.counts

    def finish(self, ended: bool) -> None:
        """After the task's last step, save the state that it leaves. `ended`: as in `save`."""
        with self.tools.ledger.time("checkpoint"):
            self.save(self.task.finish(self.state, self.checkpoints), None, ended)

    def save(self, state: S, position: object, ended: bool) -> None:
        """Save `state` as step `self.number`.

        `position`: the position in the data; None after a task's last step. `ended`: whether the run ends here, see
        `Ledger.state`.
        """
        finite = [value for value in self.recent if np.isfinite(value)]
        self.checkpoints.lock.require_held()
        meta = {
            "stage": self.task.name,
            "stage_step": int(state.step),
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
            "data": position,
            "documents": self.reader.documents,
            "watch": self.watch.state(),
            "time": self.tools.ledger.state(ended),
            "owed": self.owed,
        }
        # Without a finite value since the last save there are no metrics, and Keep.best does not count the step.
        metrics = {"stage": self.place, "loss": float(np.mean(finite))} if finite else None
        if not self.recent and position is not None:
            self._warn_of_no_rank()
        self.checkpoints.steps.save(self.number, groups(state), meta, metrics)
        self.recent.clear()
        self.watch.saved()

    def _step(self) -> None:
        ledger, running = self.tools.ledger, self.pending[-1][1]["loss"] if self.pending else None
        self.tools.profiler.step(running)
        with ledger.waiting(running):
            batch = self.reader.place(next(self.reader), self.layout)
        if self.number == self.first:
            self.read = self.reader.check()
            self.task.check_batch(batch)
        self.number += 1
        limit = np.float32(self.watch.limit(self.number))
        with jax.profiler.StepTraceAnnotation("train", step_num=self.number):
            if self.called:
                self.state, values = self.step(self.state, self.frozen, batch, limit)
            else:
                with ledger.time("compile"):
                    self.state, values = self.step(self.state, self.frozen, batch, limit)
        self.called = True
        ledger.count_step(self.flops)
        self.pending.append((self.number, values))

    def _judge(self, leave: int) -> bool:
        """Judge the pending steps except the last `leave`, which may still run. Returns False if the run went back."""
        while len(self.pending) > leave:
            number, values = self.pending.popleft()
            values = {name: float(value) for name, value in values.items()}
            latest = self.checkpoints.steps.latest()
            left = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is step {latest}"
            standing = f"step {number} ({self.task.name}); {left}"
            if self.watch.judge(number, values, standing) == "rollback":
                self._go_back(number)
                return False
            if values.get("targets") == 0:
                self._warn_of_no_targets(number)
            self.seen = values
            self.recent += [values[self.best]] if self.best in values else []
            self.tools.ledger.count_tokens(values["tokens"])
        return True

    def _compare_documents(self, then: object) -> None:
        """Warns if a source had another number of documents when the step was saved. `then`: those numbers by
        source.
        """
        for name, now in self.reader.documents.items():
            before = then.get(name, now) if isinstance(then, dict) else now
            if before != now and self.tools.metrics.writes:
                print(
                    f"WARNING: the data source {name!r} has {now} documents, but had {before} when step {self.number} "
                    f"was saved; the run resumes at the same position in the data, so it may skip documents or read "
                    f"some of them again",
                    file=sys.stderr,
                )

    def _warn_of_no_rank(self) -> None:
        """Warns once that a step is saved without a value of `best`, so that `keep_best` cannot rank it."""
        if not self.unranked and self.checkpoints.steps.keep.best and self.tools.metrics.writes:
            self.unranked = True
            print(
                f"WARNING: step {self.number} ({self.task.name}) is not ranked for keep_best, because no {self.best!r} "
                f"was measured since the step that was saved before; check best_metric, or evaluate as often as steps "
                f"are saved",
                file=sys.stderr,
            )

    def _warn_of_no_targets(self, number: int) -> None:
        """Warns at the 1st, 2nd, 4th, 8th, ... step whose batch has no targets."""
        count = self.watch.counts["without_targets"]
        if count & (count - 1) == 0 and self.tools.metrics.writes:
            print(
                f'WARNING: nothing is predicted in the batch of step {number} (it has no "predict" or "generate" that '
                f"this task "
                f"learns from); {count} such steps so far",
                file=sys.stderr,
            )

    def _go_back(self, bad: int) -> None:
        """Restore the state of the last checkpoint. The data continues after the batches that were read."""
        tools = self.tools
        self.pending.clear()
        with tools.ledger.time("restart"):
            self.checkpoints.steps.wait()
            self.state, _ = restore(self.task, self.checkpoints, self.mesh)
        self.number = self.first + int(self.state.step)
        tools.ledger.rewind()
        self.since_log = (tools.ledger.split(), tools.ledger.tokens)
        self.watch.rewind(self.number)
        tools.metrics.rewind(self.number)
        self.recent.clear()
        if tools.metrics.writes:
            print(f"WARNING: step {bad} was bad; resuming from step {self.number} with other data", file=sys.stderr)
        tools.bar.update(self.number - tools.bar.n)

    def _log(self, steps: int) -> None:
        ledger, (before, tokens) = self.tools.ledger, self.since_log
        timings = ledger.speed(before, steps, ledger.tokens - tokens, self.flops, self.settings.peak_flops)
        now = ledger.split()
        timings |= {f"goodput_{kind}": now[kind] / now["total"] for kind in now if kind != "total"}
        read = {f"documents/{name}": count for name, count in self.read.items()}
        self.tools.metrics.write(self.number, self.task.name, self.seen | self.watch.counts | read, timings)
        losses = (f"{name}={value:.3f}" for name, value in self.seen.items() if name.endswith("_loss"))
        self.tools.bar.set_postfix_str(f"{self.task.name} {' '.join(losses)}")
        self.since_log = (now, ledger.tokens)

    def _evaluate(self, last: int) -> None:
        """Run the evaluations that are due. Each logs its numbers on a line of its own."""
        metrics, name = self.tools.metrics, self.task.name
        for each in self.evals:
            if not each.due(self.number, last):
                continue
            with self.tools.ledger.time("evals"):
                found = each.evaluate(self.number, self.state, self.frozen)
            numbers = {f"{each.name}/{key}": value for key, value in found.numbers.items()}
            if numbers:
                metrics.write(self.number, name, numbers)
            metrics.show(self.number, name, {f"{each.name}/{key}": value for key, value in found.pictures.items()})
            if self.best in numbers:
                self.recent = [numbers[self.best]]
        self.owed = False


def restore(task: Task[S], checkpoints: CheckpointDirectory, mesh: jax.sharding.Mesh) -> tuple[S, object]:
    """A task's state and data position at the newest step. If that step is another task's: the state before the first
    step, and None."""
    latest = checkpoints.steps.latest()
    if not latest:  # step 0 of `Trainer.begin` holds the fresh parameters of the first task
        return task.new_state(None), None
    meta, wanted = checkpoints.steps.meta(latest), task.abstract_state()
    if meta["stage"] != task.name:
        continues = task.continues(meta["stage"])
        params = checkpoints.steps.restore(latest, {"params": wanted.params})["params"] if continues else None
        return task.new_state(params), None
    found = checkpoints.steps.restore(latest, groups(wanted))
    wrap = jax.jit(jax.random.wrap_key_data, out_shardings=sharding.replicated(mesh))
    key = wrap(np.array(meta["key"], np.uint32))
    return wanted.replace(step=np.int32(meta["stage_step"]), key=key, **found), meta["data"]


CHECKED = 100  # steps between two looks at the counts of faulty documents where hosts must agree on them


def _due(every: int, number: int) -> bool:
    """Whether something that happens every `every` steps is due after step `number`. 0: never."""
    return every > 0 and number % every == 0
