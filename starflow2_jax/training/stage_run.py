"""The steps of one stage: read, step, look, log, save; and what happens when a step goes wrong or the machine is taken away."""

import sys
from collections import deque
from dataclasses import dataclass, field

import jax
import numpy as np
from tqdm import tqdm

from starflow2_jax.models.flops import training_flops
from starflow2_jax.parallel import sharding
from starflow2_jax.stages import Stage
from starflow2_jax.training.faults import Watch
from starflow2_jax.training.goodput import Ledger
from starflow2_jax.training.metrics import Metrics
from starflow2_jax.training.preemption import Preempted, Preemption
from starflow2_jax.training.profiling import Profiler


def due(every: int, number: int) -> bool:
    """Whether something that is done after every so many steps is due after step `number`; 0: never."""
    return every > 0 and number % every == 0


@dataclass
class Tools:
    """What all stages of a run share."""

    metrics: Metrics
    bar: tqdm
    ledger: Ledger
    preemption: Preemption
    profiler: Profiler
    faults: dict = field(default_factory=dict)  # how many steps went wrong, and what was done


class StageRun:
    """One stage of `trainer`'s run, from where it stands; `first`: steps of the run before the stage."""

    def __init__(self, trainer, stage: Stage, first: int, tools: Tools):
        self.trainer, self.stage, self.first, self.tools = trainer, stage, first, tools
        self.cfg, self.config = trainer.config.stages[stage.name], trainer.config
        latest = trainer.checkpoints.latest()
        meta = trainer.checkpoints.meta(latest) if latest else {}
        watched = dict(meta.get("watch", {}))
        if meta.get("stage") != stage.name:
            watched.pop("losses", None)  # of another stage they say nothing
        with tools.ledger.time("restart"):
            self.optimizer = trainer.optimizer(stage)
            self.state, self.frozen, position = trainer._begin(stage, self.optimizer, latest)
            self.reader, self.layout = trainer.reader(stage), sharding.batch_sharding(trainer.mesh)
            if position is not None:
                self.reader.set_state(position)
            self.step = trainer.step(stage, self.optimizer)
        self.watch = Watch(self.config.faults, watched)
        tools.faults = self.watch.counts
        self.flops = training_flops(trainer.model.cfg, stage, trainer.shape(stage)).total  # of one step, all devices
        self.number = first + int(self.state.step)  # steps of the whole run that are done
        self.pending: deque[tuple[int, dict]] = deque()  # steps not looked at yet
        self.since_log = (tools.ledger.split(), tools.ledger.tokens)  # at the last log
        self.recent: list[float] = []  # losses since the last save
        self.called = False

    def run(self, last: int, stop_at: int | None) -> bool:
        """Go on to step `last` of the whole run. Returns whether it got there; raises Preempted, NonFiniteLoss, LossSpike."""
        tools, config = self.tools, self.config
        tools.bar.update(self.number - self.first)
        logged = self.number
        while self.number < last:
            self._step()
            number = self.number
            told = tools.preemption.reached(number)
            saves = number < last and (due(config.save_every, number) or number == stop_at or told)
            logs = due(config.log_every, number) or (number == last and config.log_every > 0)
            if not self._look(0 if saves or logs else 1):
                logged = self.number
                continue
            if logs:
                self._log(number - logged)
                logged = number
            tools.bar.update()
            if saves:
                self._save(ended=number == stop_at)
            if told and number < last:
                raise Preempted
            if number == stop_at and number < last:
                return False
        return True

    def _step(self) -> None:
        ledger, running = self.tools.ledger, self.pending[-1][1]["loss"] if self.pending else None
        self.tools.profiler.step(running)
        with ledger.waiting(running):
            batch = self.reader.place(next(self.reader), self.layout)
        self.number += 1
        limit = np.float32(self.watch.limit(self.number))
        with jax.profiler.StepTraceAnnotation("train", step_num=self.number):
            if self.called:
                self.state, values = self.step(self.state, self.frozen, batch, limit)
            else:
                with ledger.time("compile"):
                    self.state, values = self.step(self.state, self.frozen, batch, limit)
        self.called = True
        ledger.steps += 1
        ledger.flops += self.flops
        self.pending.append((self.number, values))

    def _look(self, leave: int) -> bool:
        """Look at the steps but for the last `leave`, which may still be running. False: the run went back."""
        while len(self.pending) > leave:
            number, values = self.pending.popleft()
            values = {name: float(value) for name, value in values.items()}
            latest = self.trainer.checkpoints.latest()
            left = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is step {latest}"
            standing = f"step {number} ({self.stage.name}); {left}"
            if self.watch.judge(number, values, standing) == "rollback":
                self._go_back(number)
                return False
            self.seen = values
            self.recent.append(values["loss"])
            self.tools.ledger.tokens += values["tokens"]
        return True

    def _go_back(self, bad: int) -> None:
        """To the last checkpoint's parameters; the data goes on after what was read."""
        tools, checkpoints = self.tools, self.trainer.checkpoints
        self.pending.clear()
        with tools.ledger.time("restart"):
            checkpoints.wait()
            self.state, self.frozen, _ = self.trainer._begin(self.stage, self.optimizer, checkpoints.latest())
        self.number = self.first + int(self.state.step)
        tools.ledger.rewind()
        self.since_log = (tools.ledger.split(), tools.ledger.tokens)
        self.watch.rewind(self.number)
        tools.metrics.rewind(self.number)
        self.recent.clear()
        if tools.metrics.writes:
            print(f"WARNING: step {bad} went wrong; going on from step {self.number} with other data", file=sys.stderr)
        tools.bar.update(self.number - tools.bar.n)

    def _log(self, steps: int) -> None:
        ledger, (before, tokens) = self.tools.ledger, self.since_log
        timings = ledger.speed(before, steps, ledger.tokens - tokens, self.flops, self.trainer.peak)
        now = ledger.split()
        timings |= {f"goodput_{kind}": now[kind] / now["total"] for kind in now if kind != "total"}
        self.tools.metrics.write(self.number, self.stage.name, self.seen | self.watch.counts, timings)
        losses = (f"{name}={value:.3f}" for name, value in self.seen.items() if name.endswith("_loss"))
        self.tools.bar.set_postfix_str(f"{self.stage.name} {' '.join(losses)}")
        self.since_log = (now, ledger.tokens)

    def _save(self, ended: bool) -> None:
        with self.tools.ledger.time("checkpoint"):
            self.save(self.state, self.reader.get_state(), ended)

    def save(self, state, position, ended: bool) -> None:
        """`position`: of the data; `ended`: whether the time from here to the next start is no loss."""
        finite = [loss for loss in self.recent if np.isfinite(loss)]
        order = list(self.config.order).index(self.stage.name)
        metrics = {"stage": order, "loss": float(np.mean(finite))} if finite else None  # None: not among the best
        rest = {"watch": self.watch.state(), "time": self.tools.ledger.state(ended)}
        self.trainer._save(self.stage, self.number, state, position, rest, metrics)
        self.recent.clear()
        self.watch.since_save = 0
