"""The loop over the tasks of a run; and the Trainer, which trains the stages of STARFlow2 in a checkpoint directory."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from starflow2_jax.checkpoints.atomic_folder import new_folder, require_new
from starflow2_jax.checkpoints.damage import pass_over_damaged, pass_over_unreadable
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.config import loading as configs
from starflow2_jax.config.evals import best_metric, left_out
from starflow2_jax.config.schema import Config
from starflow2_jax.data import sources
from starflow2_jax.errors import ConfigError, UserError, storage_errors
from starflow2_jax.fields import differences
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.models.vlm import VlmConfig
from starflow2_jax.parallel import processes, sharding
from starflow2_jax.parallel.hardware import peak_flops
from starflow2_jax.stages import STAGES
from starflow2_jax.training import beginning
from starflow2_jax.training.evals.protocol import Evaluation
from starflow2_jax.training.evals.table import evaluations
from starflow2_jax.training.goodput import Ledger
from starflow2_jax.training.metrics import Metrics
from starflow2_jax.training.preemption import Preemption
from starflow2_jax.training.profiling import Profiler
from starflow2_jax.training.program import held_whole, makes_vlm
from starflow2_jax.training.run import Run, Settings, Tools
from starflow2_jax.training.stage_task import StageTask
from starflow2_jax.training.task import Task


def train(
    tasks: Sequence[Task],
    checkpoints: CheckpointDirectory,
    mesh: jax.sharding.Mesh,
    settings: Settings,
    progress: bool = True,
    stop_at: int | None = None,
    profile: int = 0,
    evals: Callable[[Any], Sequence[Evaluation]] = lambda task: (),
    best: Callable[[Any], str] = lambda task: "loss",
) -> dict:
    """Train the tasks that are not done yet, in their order.

    `stop_at`: save and return after this step, counted over all tasks. `profile`: number of steps to profile into
    profile/. `evals`: the evaluations of a task. `best`: the metric by which a task's steps are ranked.

    Returns the speed and the shares of the time (Ledger.summary) and the counts of bad steps (Watch.counts), which are
    also written to metrics/summary.json. Raises Preempted after SIGTERM, when everything is saved, and NonFiniteLoss or
    LossSpike for a bad step, if that is the policy.
    """
    if profile < 0:
        raise UserError(
            f"the number of steps to profile must be at least 0, not {profile}; leave out --profile for none"
        )
    checkpoints.steps.open()
    done = checkpoints.steps.latest() or 0
    ledger = Ledger(checkpoints.steps.meta(done).get("time") if done else None)
    folder, writes = checkpoints.folder, processes.primary()
    total = sum(task.steps for task in tasks)
    with (
        jax.set_mesh(mesh),
        ledger.noticing_compilations(),
        Preemption.listening() as preemption,
        Metrics(folder / "metrics", done, writes) as metrics,
        tqdm(total=total, disable=not (progress and writes), unit="step", dynamic_ncols=True) as bar,
    ):
        tools = Tools(metrics, bar, ledger, preemption, Profiler(folder / "profile", profile))
        faults: dict[str, int] = {}
        try:
            first = 0
            for place, task in enumerate(tasks):
                last, latest = first + task.steps, checkpoints.steps.latest()
                if latest is not None and latest >= last:
                    bar.update(task.steps)
                else:
                    run = Run(task, place, first, checkpoints, mesh, settings, tools, evals(task), best(task))
                    faults = run.faults
                    with contextlib.closing(run.reader):
                        arrived = run.run(last, stop_at)
                    if not arrived:
                        break
                    run.finish(ended=last == stop_at or task is tasks[-1])
                    latest = last
                if latest == stop_at:
                    break
                first = last
        finally:
            tools.profiler.stop()
            with ledger.time("checkpoint"):
                checkpoints.steps.wait()
            summary = ledger.summary(settings.peak_flops) | {"faults": faults}
            metrics.write_summary(summary)
    return summary


class Trainer:
    """Trains the stages of a config in a checkpoint directory."""

    def __init__(self, config: Config, folder: str | Path):
        """Open the directory `folder`, or prepare to make it; `run` writes it.

        Raises ConfigError if the config contradicts itself, the directory or the codec, CheckpointError if the
        directory cannot be read, and LockedError if another run trains there.
        """
        self.config = config = configs.complete(config)
        keep = Keep(config.keep, config.keep_every, config.keep_best)
        self.checkpoints = CheckpointDirectory(folder, keep)
        processes.on_primary(self.checkpoints.lock.require_free)
        self.model = Pretzel(configs.pretzel(config))
        axes = config.mesh
        self.mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, sequence=axes.sequence)
        self.begun = processes.on_primary(self.checkpoints.exists)
        if self.begun:
            if other := differences(configs.pretzel(self.checkpoints.config()), self.model.cfg):
                raise ConfigError(
                    f"{folder} holds another model than the config: its {', '.join(other)}; change the config, or name "
                    f"another --out"
                )
            self.codec, self.tokenizer = self.checkpoints.codec(), self.checkpoints.tokenizer()
        else:
            self.codec, self.tokenizer = sources.make_codec(config), sources.make_tokenizer(config)
        if len(self.tokenizer) > self.model.cfg.vlm.vocabulary:
            raise ConfigError(
                f"the tokenizer has {len(self.tokenizer)} tokens; set model.vlm.vocabulary to at least this number"
            )
        if (self.model.cfg.grid, self.model.cfg.channels) != (self.codec.grid, self.codec.channels):
            raise ConfigError(
                f"the codec makes a grid of {self.codec.grid} tokens with {self.codec.channels} channels; set "
                f"model.grid and model.channels to the same"
            )

    def task(self, name: str) -> StageTask:
        """The task of the stage `name`."""
        return StageTask(self.config, STAGES[name], self.model, self.codec, self.tokenizer, self.mesh)

    def run(self, progress: bool = True, stop_at: int | None = None, profile: int = 0) -> dict:
        """Train the stages that are not done yet; arguments, result and errors as for `train`.

        Also raises LockedError if another run trains in the directory, ConfigError if the stages that are done do not
        fit the config, and StorageError if a file cannot be written; then the same call resumes from the last good
        checkpoint.
        """
        c = self.config
        settings = Settings(c.log_every, c.save_every, c.faults, peak_flops(c.peak_flops))
        if not self.begun:
            self._require_stages()  # now, before anything is written
        with storage_errors(self.checkpoints.folder), self.checkpoints.writing():
            self._prepare()
            if processes.primary() and (whole := self._held_whole()):
                print(f"NOTE: {whole}", file=sys.stderr)
            tasks = [self.task(name) for name in c.order]  # with the codec that the directory holds
            return train(
                tasks, self.checkpoints, self.mesh, settings, progress, stop_at, profile, self._evals, self._best
            )

    def _evals(self, task: StageTask) -> list[Evaluation]:
        """A stage's evaluations; says which of the config's are left out."""
        for name, reason in left_out(self.config, task.stage).items():
            if processes.primary():
                print(f"evals.{name} is left out of stage {task.name}: {reason}", file=sys.stderr)
        return evaluations(task, self.checkpoints.folder)

    def _best(self, task: StageTask) -> str:
        return best_metric(self.config, task.stage)

    def _prepare(self) -> None:
        """Make the directory, or prepare to resume from it. All processes of the run call it together."""
        if not self.begun and processes.on_primary(self.checkpoints.exists):
            raise UserError(
                f"another run has just made {self.checkpoints.folder}; start the same command again to continue there"
            )
        if self.begun:
            pass_over_damaged(self.checkpoints.steps)
            pass_over_unreadable(self.checkpoints.steps, self.mesh)
            self._require_same_steps()
            self._require_stages()
            processes.on_primary(partial(self.checkpoints.write_config, self.config))
        else:
            self._create()
        self.begun = True

    def _create(self) -> None:
        """Make the directory. All processes of the run call it together."""
        processes.on_primary(partial(self.checkpoints.create, self.config, self.codec, self.tokenizer))
        if not processes.primary():  # use what process 0 fitted: another machine's fit may differ in the last bit
            self.codec, self.tokenizer = self.checkpoints.codec(), self.checkpoints.tokenizer()

    def _held_whole(self) -> str:
        return held_whole(self.config, self.model, self.mesh)

    def _require_same_steps(self) -> None:
        """Raises ConfigError if a run with the config's order and steps would not pass through the directory's last
        step.
        """
        if not (done := self.checkpoints.steps.latest()):
            return
        meta, order = self.checkpoints.steps.meta(done), list(self.config.order)
        name, own = meta["stage"], meta["stage_step"]
        before = sum(self.config.stages[n].steps for n in order[: order.index(name)]) if name in order else None
        folder, steps = self.checkpoints.folder, self.config.stages[name].steps if name in order else 0
        if before is None or before + own != done or own > steps:
            raise ConfigError(
                f"{folder} is at step {done} ({own} of them in stage {name}), which this config's order and steps "
                f"never reach; keep the order and steps of the stages that are done, or name another --out"
            )
        if own < steps and not self.checkpoints.steps.has(done, "optimizer"):
            raise ConfigError(
                f"stage {name} of {folder} ended after {own} steps and cannot go on to {steps}, because its optimizer "
                f"state was deleted; leave stages.{name}.steps at {own}, or name another --out"
            )

    def _require_stages(self) -> None:
        """Check the stages that are not done yet, so that no fault shows only after hours. Raises ConfigError."""
        done, last = self.checkpoints.steps.latest() or 0, 0
        for name in self.config.order:
            last += self.config.stages[name].steps
            if last <= done:
                continue
            try:
                (task := self.task(name)).check()
                evaluations(task, self.checkpoints.folder)
            except UserError as error:
                raise ConfigError(f"stage {name}: {error}") from None

    @classmethod
    def begin(
        cls,
        config: Config,
        folder: str | Path,
        vlm: str | Path,
        read_config: Callable[[Path], VlmConfig],
        say: Callable[[str], None] = lambda line: None,
        force: bool = False,
    ) -> None:
        """Make a directory `folder` for a run on the converted VLM in the folder `vlm`, with untrained flows as step 0.

        `read_config` reads vlm.json. `say` gets a line about each piece of work before it begins. `force`: also begin
        if the flows do not fit into memory. Raises UserError if they do not, if `folder` exists or if the config
        describes another VLM, and StorageError if a file cannot be written; then no folder is left.
        """
        config, vlm, folder = configs.complete(config), Path(vlm), Path(folder).resolve()
        require_new(folder)
        if makes_vlm(config):
            raise ConfigError(f"{vlm} holds a pretrained VLM; remove the stage pretrain from the config's order")
        if other := differences(read_config(vlm / "vlm.json"), configs.pretzel(config).vlm):
            raise ConfigError(
                f"{vlm} holds another VLM than the config: its {', '.join(other)}; change model.vlm in the config"
            )
        axes = config.mesh
        mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, sequence=axes.sequence)
        model = Pretzel(configs.pretzel(config))
        groups, copied = beginning.groups(model, mesh), sum(file.stat().st_size for file in vlm.rglob("*"))
        beginning.require_memory(groups, mesh, folder, say, force)
        codec = sources.make_codec(config)
        with new_folder(folder, copied + sum(group.size for group in groups)) as partial:
            say(f"copying the VLM: {copied / 1e9:.3g} GB")
            CheckpointDirectory(partial).create_on(vlm, config, codec)
            trainer = cls(config, partial)
            meta = {"stage": config.order[0], "stage_step": 0, "key": [], "data": None}
            with jax.set_mesh(mesh):
                params = beginning.make(model, config.seed, groups, mesh, say)
                say(f"writing the checkpoint: {sum(group.size for group in groups) / 1e9:.3g} GB")
                trainer.checkpoints.steps.save(0, {"params": params}, meta)
            trainer.checkpoints.steps.close()
