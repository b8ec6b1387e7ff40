"""STARFlow2's stages as tasks of the loop: each is made from its row of the stage table and the config."""

from functools import cached_property, partial

import jax
from jax.sharding import Mesh
from optax import GradientTransformation

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.config.schema import Config
from starflow2_jax.data import sources
from starflow2_jax.data.faults import DataFaultsConfig
from starflow2_jax.data.groups import GroupedBatches, own_rows
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.flops import training_flops
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import sharding
from starflow2_jax.random_streams import stream_key
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import STAGES, Stage
from starflow2_jax.training import losses, program
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.step import TrainState, finish, new_state, require_host
from starflow2_jax.training.task import Step

REMEMBERED = 100_000  # texts whose tokens a reader keeps, because captions and questions repeat


class StageTask:
    """See task.Task. The state holds the tree that the stage trains, "frozen" or "trainable". The step gets the other tree as
    an argument."""

    def __init__(self, config: Config, stage: Stage, model: Pretzel, codec: Codec, tokenizer, mesh: Mesh):
        self.config, self.stage, self.model, self.mesh = config, stage, model, mesh
        self.codec, self.tokenizer = codec, tokenizer
        self.name, self.cfg = stage.name, config.stages[stage.name]
        self.steps = self.cfg.steps

    @cached_property
    def optimizer(self) -> GradientTransformation:
        return make_optimizer(self.cfg.optimizer, self.steps)

    @property
    def flops(self) -> float:
        return training_flops(self.model.cfg, self.stage, program.batch_shape(self.config, self.stage)).total

    def check(self) -> None:
        program.require_rows(self.config, self.stage, self.mesh)
        if self.cfg.optimizer.offload:
            require_host(self.mesh)
        self.step()
        sources.streams(self.config, self.stage, self.codec)

    def continues(self, name: str) -> bool:
        return program.held(STAGES[name]) == program.held(self.stage)

    def abstract_state(self) -> TrainState:
        return program.abstract_state(self.config, self.model, self.stage, self.optimizer, self.mesh)

    def new_state(self, params: dict | None) -> TrainState:
        if params is None:
            params = self.fresh(program.held(self.stage))
        key = stream_key(self.config.seed, "stage", self.name)
        make = partial(new_state, stage=self.stage, optimizer=self.optimizer, key=key)
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(make, out_shardings=layout)(params)

    def fresh(self, tree: str) -> dict:
        """Fresh parameters of one of the two trees."""
        return program.fresh_params(self.model, self.config.seed, tree, self.mesh)

    def frozen(self, checkpoints: CheckpointDirectory) -> dict:
        """The tree that the state does not hold. Raises ConfigError if there is no pretrained VLM yet."""
        if program.held(self.stage) == "frozen":
            return self.fresh("trainable")
        if not checkpoints.frozen.exists():
            raise ConfigError(f"stage {self.name} needs a pretrained VLM; run the stage pretrain before it")
        return checkpoints.frozen.restore(sharding.abstract(program.abstract_params(self.model, "frozen"), self.mesh))

    def step(self) -> Step:
        return program.jitted_step(self.config, self.model, self.stage, self.optimizer, self.codec.std, self.mesh)

    def check_batch(self, batch: Sequence) -> None:
        """Raises ConfigError if no part of the batch counts in the stage's losses."""
        if not float(jax.jit(partial(losses.targets, stage=self.stage))(batch)):
            paths = ", ".join(each.config.path for each in sources.named(self.config, self.name))
            wanted = [
                *(['images with "generate": true'] if self.stage.image_loss else []),
                *(['texts with "predict": true'] if self.stage.text_loss else []),
            ]
            raise ConfigError(
                f"nothing is predicted in the first batch of stage {self.name}, so it would learn nothing; the documents of "
                f'{paths} need {" or ".join(wanted)} (each part of a document is marked by "predict" or '
                '"generate")'
            )

    def batches(self) -> GroupedBatches:
        return self.reader(sources.streams(self.config, self.stage, self.codec), self.config.data.workers)

    def reader(self, streams: list[Stream], workers: int = 0) -> GroupedBatches:
        """Batches of the stage's shape, from the beginning of `streams`; each process reads the rows that its devices need."""
        shape, data = program.batch_shape(self.config, self.stage), self.config.data
        rows = own_rows(sharding.batch_sharding(self.mesh), shape.rows)
        encoder = Encoder(self.tokenizer, self.codec, self.model.cfg.vlm.vision, remembered=REMEMBERED)
        faults = DataFaultsConfig(data.faults.most, data.faults.strict)
        return GroupedBatches(streams, encoder, shape, data.groups, workers, data.threads, faults, rows)

    def finish(self, state: TrainState, checkpoints: CheckpointDirectory) -> TrainState:
        """The averaged parameters, without average and optimizer. The stage that pretrains the VLM saves it as frozen weights."""
        done = state.replace(params=finish(state), ema={}, optimizer={})
        if program.held(self.stage) == "frozen":
            checkpoints.frozen.save(done.params)
        return done
