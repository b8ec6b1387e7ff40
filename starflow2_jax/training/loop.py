"""The loop over stages and steps: what is made first, where each stage goes on from, what it hands on."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from starflow2_jax.checkpoints.atomic_folder import new_folder, require_new
from starflow2_jax.checkpoints.directory import CheckpointDirectory, abstract
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.config import loading as configs
from starflow2_jax.data import sources
from starflow2_jax.data.groups import GroupedBatches, own_rows
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.models.pretzel import Pretzel, init_params
from starflow2_jax.parallel import processes, sharding
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES, Stage
from starflow2_jax.training.faults import Watch
from starflow2_jax.training.goodput import Ledger, peak_flops
from starflow2_jax.training.metrics import Metrics
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.preemption import Preemption
from starflow2_jax.training.profiling import Profiler
from starflow2_jax.training.program import batch_shape, held, in_tree, jitted_step, makes_vlm, require_rows
from starflow2_jax.training.stage_run import StageRun, Tools
from starflow2_jax.training.step import TrainState, finish, new_state, require_host, state_shardings
from starflow2_jax.weights.qwen import load_config


class Trainer:
    """A config and a checkpoint directory. `run` trains whatever of the stages is not done yet."""

    def __init__(self, config: ConfigDict, folder: str | Path):
        if unknown := set(config.order) - (set(STAGES) & set(config.stages)):
            raise ConfigError(f"unknown stages {sorted(unknown)} in order; there are {', '.join(STAGES)}")
        if not config.order or len(set(config.order)) < len(config.order):
            raise ConfigError(f"order names each stage to run once, one at least, of {', '.join(STAGES)}")
        self.config = config
        keep = Keep(config.keep, config.keep_every, config.keep_best)
        self.checkpoints = CheckpointDirectory(folder, keep)
        self.peak = peak_flops(config.peak_flops)
        self.model = Pretzel(configs.pretzel(config))
        self.mesh = sharding.make_mesh(**config.mesh)
        self.begun = processes.on_primary(self.checkpoints.exists)
        if self.begun:
            if other := configs.differences(configs.pretzel(self.checkpoints.config()), self.model.cfg):
                raise ConfigError(f"{folder} holds another model than the config's: there {', '.join(other)}")
            self.codec, self.tokenizer = self.checkpoints.codec(), self.checkpoints.tokenizer()
        else:
            self.codec, self.tokenizer = sources.make_codec(config), sources.make_tokenizer(config)
        if len(self.tokenizer) > self.model.cfg.vlm.vocabulary:
            raise ConfigError(f"the tokenizer has {len(self.tokenizer)} tokens; raise model.vlm.vocabulary to that")
        if (self.model.cfg.grid, self.model.cfg.channels) != (self.codec.grid, self.codec.channels):
            raise ConfigError(
                f"the codec makes {self.codec.grid} tokens of {self.codec.channels} channels; set model.grid and model.channels so"
            )

    def run(self, progress: bool = True, stop_at: int | None = None, profile: int = 0) -> dict:
        """Train all stages. Returns where the time went (see Ledger.summary), faults counted; it is in summary.json, too.

        `stop_at`: save and return after that many steps of the whole run; `profile`: trace so many steps into profile/.
        Raises Preempted when all is saved after a SIGTERM.
        """
        self._prepare()
        done = self.checkpoints.latest() or 0
        ledger = Ledger(self.checkpoints.meta(done).get("time") if done else None)
        total = sum(self.config.stages[name].steps for name in self.config.order)
        folder, writes = self.checkpoints.folder, processes.primary()
        with (
            jax.set_mesh(self.mesh),
            ledger.noticing_compilations(),
            Preemption.listening() as preemption,
            Metrics(folder / "metrics", done, writes) as metrics,
            tqdm(total=total, disable=not (progress and writes), unit="step", dynamic_ncols=True) as bar,
        ):
            tools = Tools(metrics, bar, ledger, preemption, Profiler(folder / "profile", profile))
            try:
                first = 0
                for name in self.config.order:
                    if not self._run_stage(STAGES[name], first, stop_at, tools):
                        break
                    first += self.config.stages[name].steps
            finally:
                tools.profiler.stop()
                with ledger.time("checkpoint"):
                    self.checkpoints.wait()
                summary = ledger.summary(self.peak) | {"faults": tools.faults}
                metrics.write_summary(summary)
        return summary

    def _prepare(self) -> None:
        """The directory, made or gone on with; the processes of a run do it together."""
        if self.begun:
            self.checkpoints.pass_over_damaged()
            self.checkpoints.pass_over_unreadable(self.mesh)
            self._require_same_steps()
        self._require_stages()
        if self.begun:
            processes.on_primary(partial(self.checkpoints.write_config, self.config))
        else:
            processes.on_primary(partial(self.checkpoints.create, self.config, self.codec, self.tokenizer))
        self.begun = True
        if not processes.primary():  # fitted on another machine, it may differ in the last bit
            self.codec, self.tokenizer = self.checkpoints.codec(), self.checkpoints.tokenizer()

    def _require_same_steps(self) -> None:
        """Raises ConfigError where the config puts the stages that the directory has done elsewhere."""
        if not (done := self.checkpoints.latest()):
            return
        meta, order = self.checkpoints.meta(done), list(self.config.order)
        name, own = meta["stage"], meta["stage_step"]
        before = sum(self.config.stages[n].steps for n in order[: order.index(name)]) if name in order else None
        folder, steps = self.checkpoints.folder, self.config.stages[name].steps if name in order else 0
        if before is None or before + own != done or own > steps:
            raise ConfigError(
                f"{folder} stands at step {done}, {own} of them in {name}, where this config's order and steps do not come by; "
                "keep those of what is done, or name another --out"
            )
        if own < steps and not self.checkpoints.has(done, "optimizer"):
            raise ConfigError(
                f"stage {name} of {folder} has ended after {own} steps, and its optimizer was not kept, so that it cannot go on "
                f"to {steps}; leave stages.{name}.steps at {own}, or name another --out"
            )

    def _require_stages(self) -> None:
        """Raises UserError for what would stop a stage that is still to come, before anything is trained."""
        Watch(self.config.faults)
        done, last = self.checkpoints.latest() or 0, 0
        for name in self.config.order:
            last += self.config.stages[name].steps
            if last <= done:
                continue
            try:
                self._require_stage(STAGES[name])
            except UserError as error:
                raise ConfigError(f"stage {name}: {error}") from None

    def _require_stage(self, stage: Stage) -> None:
        cfg = self.config.stages[stage.name]
        require_rows(self.config, stage, self.mesh)
        if cfg.optimizer.offload:
            require_host(self.mesh)
        self.step(stage, self.optimizer(stage))  # compiles nothing
        sources.documents(self.config, stage, self.codec.image_channels)

    @classmethod
    def begin(cls, config: ConfigDict, folder: str | Path, vlm: str | Path) -> None:
        """A new directory `folder` for a run on the converted VLM in `vlm`, with untrained flows saved as step 0.

        Raises UserError where the config describes another VLM; then nothing is left behind.
        """
        vlm, folder = Path(vlm), Path(folder).resolve()
        require_new(folder)
        if makes_vlm(config):
            raise ConfigError("the VLM is pretrained; take the stage pretrain out of the config's order")
        if other := configs.differences(load_config(vlm / "vlm.json"), configs.pretzel(config).vlm):
            raise ConfigError(f"{vlm} holds another VLM than the config's model.vlm: there {', '.join(other)}")
        codec = sources.make_codec(config)
        with new_folder(folder, sum(file.stat().st_size for file in vlm.rglob("*"))) as partial:
            CheckpointDirectory(partial).create_on(vlm, config, codec)
            trainer = cls(config, partial)
            meta = {"stage": config.order[0], "stage_step": 0, "key": [], "data": None}
            with jax.set_mesh(trainer.mesh):
                trainer.checkpoints.save(0, {"params": trainer._fresh("trainable")}, meta)
            trainer.checkpoints.close()

    def _run_stage(self, stage: Stage, first: int, stop_at: int | None, tools: Tools) -> bool:
        """Run one stage from where it stands; `first`: steps of the run before it. Returns whether to go on."""
        cfg = self.config.stages[stage.name]
        last, latest = first + cfg.steps, self.checkpoints.latest()
        if latest is not None and latest >= last:
            tools.bar.update(cfg.steps)
            return latest != stop_at
        run = StageRun(self, stage, first, tools)
        if not run.run(last, stop_at):
            return False
        with tools.ledger.time("checkpoint"):
            self._hand_on(run, ended=last == stop_at or stage.name == self.config.order[-1])
        return last != stop_at

    def shape(self, stage: Stage) -> Shape:
        return batch_shape(self.config, stage)

    def step(self, stage: Stage, optimizer):
        return jitted_step(self.config, self.model, stage, optimizer, self.codec.std, self.mesh)

    def optimizer(self, stage: Stage):
        cfg = self.config.stages[stage.name]
        return make_optimizer(cfg.optimizer, cfg.steps)

    def reader(self, stage: Stage) -> GroupedBatches:
        """Of the rows that this process's devices need."""
        shape, data = self.shape(stage), self.config.data
        source = sources.documents(self.config, stage, self.codec.image_channels)
        layout = sharding.batch_sharding(self.mesh)
        rows = own_rows(layout, shape.rows)
        encoder = Encoder(self.tokenizer, self.codec, self.model.cfg.vlm.vision)
        return GroupedBatches(source, encoder, shape, data.groups, data.threads, rows)

    def _begin(self, stage: Stage, optimizer, latest: int | None) -> tuple[TrainState, dict, object]:
        """State, frozen parameters and data position: from the last checkpoint what it has, fresh what it lacks."""
        meta = self.checkpoints.meta(latest) if latest else None
        tree = held(stage)
        shapes = self._shapes(tree)
        if meta is None or held(STAGES[meta["stage"]]) != tree:
            params = self._fresh(tree)
        else:
            params = self.checkpoints.restore(latest, {"params": abstract(shapes, self.mesh)})["params"]
        frozen = self._frozen(stage)
        key = jax.random.fold_in(jax.random.key(self.config.seed), list(STAGES).index(stage.name))
        make = partial(new_state, stage=stage, optimizer=optimizer, key=key)
        state_shapes = jax.eval_shape(make, shapes)
        offload = self.config.stages[stage.name].optimizer.offload
        layout = state_shardings(state_shapes, self.mesh, offload)
        if meta is None or meta["stage"] != stage.name:
            return jax.jit(make, out_shardings=layout)(params), frozen, None
        wanted = {"ema": state_shapes.ema, "optimizer": state_shapes.optimizer}
        places = {"ema": layout.ema, "optimizer": layout.optimizer}
        rest = self.checkpoints.restore(latest, sharding.placed(wanted, places))
        wrap = jax.jit(jax.random.wrap_key_data, out_shardings=sharding.replicated(self.mesh))
        key = wrap(np.array(meta["key"], np.uint32))
        return (
            TrainState(np.int32(meta["stage_step"]), params, rest["ema"], rest["optimizer"], key),
            frozen,
            meta["data"],
        )

    def _shapes(self, groups) -> dict:
        return jax.eval_shape(lambda: self._initial(groups))

    def _initial(self, groups) -> dict:
        params = init_params(self.model, jax.random.key(self.config.seed))
        return {name: params[name] for name in params if in_tree(name, groups)}

    def _fresh(self, groups) -> dict:
        """Fresh parameters, born on their shards."""
        layout = sharding.tree_shardings(self._shapes(groups), self.mesh)
        return jax.jit(lambda: self._initial(groups), out_shardings=layout)()

    def _frozen(self, stage: Stage) -> dict:
        """What the model needs beside the groups that the state holds."""
        if held(stage) == "frozen":
            return self._fresh("trainable")
        if not processes.on_primary((self.checkpoints.folder / "frozen").is_dir):
            raise ConfigError(f"stage {stage.name} needs a pretrained VLM; run the stage pretrain before it")
        return self.checkpoints.restore_frozen(abstract(self._shapes("frozen"), self.mesh))

    def _save(self, stage: Stage, number: int, state: TrainState, data_state, rest: dict, metrics: dict | None) -> None:
        meta = {
            "stage": stage.name,
            "stage_step": int(state.step),
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
            "data": data_state,
            **rest,
        }
        trees = {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}
        self.checkpoints.save(number, trees, meta, metrics)

    def _hand_on(self, run: StageRun, ended: bool) -> None:
        """The end of a stage: its averaged parameters, and no optimizer."""
        done = run.state.replace(params=finish(run.state), ema={}, optimizer={})
        if held(run.stage) == "frozen":
            self.checkpoints.save_frozen(done.params)
        run.save(done, None, ended)
