"""STARFlow2's stages as tasks of the loop. Each is made from its row of the stage table and from the config."""

from functools import cached_property, partial

import jax
from jax.sharding import Mesh
from jax.stages import Wrapped
from optax import GradientTransformation
from transformers import PreTrainedTokenizerBase

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.config.schema import Config
from starflow2_jax.data import sources
from starflow2_jax.data.faults import DataFaultsConfig
from starflow2_jax.data.groups import GroupedBatches, own_rows
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder, RowEncoder
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

REMEMBERED = 100_000  # texts whose tokens the encoder remembers, because captions and questions repeat


class StageTask:
    """A stage as a `task.Task`. Its state has the tree that the stage trains, "frozen" or "trainable"; the step gets
    the other tree as an argument."""

    def __init__(
        self,
        config: Config,
        stage: Stage,
        model: Pretzel,
        codec: Codec,
        tokenizer: PreTrainedTokenizerBase,
        mesh: Mesh,
    ):
        self.config, self.stage, self.model, self.mesh = config, stage, model, mesh
        self.codec, self.tokenizer = codec, tokenizer
        self.name, self.cfg = stage.name, config.stages[stage.name]
        self.steps = self.cfg.steps

    @cached_property
    def optimizer(self) -> GradientTransformation:
        """The optimizer that the config names for the stage."""
        return make_optimizer(self.cfg.optimizer, self.steps)

    @property
    def flops(self) -> float:
        """FLOP of one step, all devices together, by the formula of models/flops.py."""
        return training_flops(self.model.cfg, self.stage, program.batch_shape(self.config, self.stage)).total

    def check(self) -> None:
        """Raises UserError for rows that do not fit the mesh, arrays that do not fit the devices' memory, devices
        without host memory, or a source that cannot be opened."""
        program.require_rows(self.config, self.stage, self.mesh)
        if self.cfg.optimizer.offload:
            require_host(self.mesh)
        program.require_memory(self.config, self.model, self.stage, self.optimizer, self.mesh)
        self.step()
        self.streams()

    def continues(self, name: str) -> bool:
        """Whether the stage `name` trains the same tree of parameters as this stage."""
        return program.trained_tree(STAGES[name]) == program.trained_tree(self.stage)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return program.abstract_state(self.config, self.model, self.stage, self.optimizer, self.mesh)

    def new_state(self, params: dict | None) -> TrainState:
        """The state before the first step, with `params` (on their shards) or fresh parameters. Its key depends on the
        seed and the stage's name alone."""
        if params is None:
            params = self.fresh(program.trained_tree(self.stage))
        key = stream_key(self.config.seed, "stage", self.name)
        make = partial(new_state, stage=self.stage, optimizer=self.optimizer, key=key)
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(make, out_shardings=layout)(params)

    def fresh(self, tree: str) -> dict:
        """Fresh parameters of one of the two trees, "frozen" or "trainable"."""
        return program.fresh_params(self.model, self.config.seed, tree, self.mesh)

    def frozen(self, checkpoints: CheckpointDirectory) -> dict:
        """The tree that the stage does not train, and "codec" if the step encodes pictures. Raises ConfigError if that
        is the VLM and the directory has none yet.
        """
        if program.trained_tree(self.stage) == "frozen":
            frozen = self.fresh("trainable")
        elif not checkpoints.frozen.exists():
            raise ConfigError(f"stage {self.name} needs a pretrained VLM; run the stage pretrain before it")
        else:
            abstract = sharding.abstract(program.abstract_params(self.model, "frozen"), self.mesh)
            frozen = checkpoints.frozen.restore(abstract)
        if self.pictures:
            weights = self.codec.encoder_weights()
            frozen["codec"] = jax.device_put(weights, sharding.tree_shardings(weights, self.mesh))
        return frozen

    def step(self) -> Wrapped:
        """The step function, which is compiled when it is first called."""
        return program.jitted_step(
            self.config, self.model, self.stage, self.optimizer, self.codec.std, self.mesh, self.codec
        )

    def check_batch(self, batch: Sequence) -> None:
        """Raises ConfigError if no part of the batch counts in the stage's losses."""
        if not float(jax.jit(partial(losses.targets, stage=self.stage))(batch)):
            paths = ", ".join(each.config.path for each in sources.named(self.config, self.name))
            wanted = [
                *(['images with "generate": true'] if self.stage.image_loss else []),
                *(['texts with "predict": true'] if self.stage.text_loss else []),
            ]
            raise ConfigError(
                f"nothing is predicted in the first batch of stage {self.name}, so the stage would learn nothing; the "
                f"documents of {paths} need {' or '.join(wanted)} (the model learns to write the texts that are marked "
                f"by "
                '"predict" and the images that are marked by "generate")'
            )

    @cached_property
    def pictures(self) -> bool:
        """Whether the step encodes pictures: the codec can, and a source of the stage or of an evaluation holds
        pictures.
        """
        if not self.codec.in_step:
            return False
        mixes = [getattr(each, "mix", None) or {} for each in self.config.evals.values()]
        named = [
            *sources.named(self.config, self.name),
            *(each for mix in mixes for each in sources.mixed(self.config, mix)),
        ]
        return any(each.open().encoded_by() is None for each in named)

    def row_encoder(self, streams: list[Stream]) -> RowEncoder:
        """Turns documents of the streams into parts of this stage's rows. It leaves pictures for the step, if that
        encodes.
        """
        vision = self.model.cfg.vlm.vision
        pictures = self.codec.in_step and any(each.source.encoded_by() is None for each in streams)
        encoder = Encoder(self.tokenizer, self.codec.without_weights(), vision, REMEMBERED, pictures)
        return RowEncoder(encoder, program.batch_shape(self.config, self.stage))

    def streams(self) -> list[Stream]:
        """The sources of this stage, opened. Raises UserError."""
        vision = self.model.cfg.vlm.vision
        return sources.streams(self.config, self.stage, self.codec, self.tokenizer, vision)

    def batches(self) -> GroupedBatches:
        """Batches of the config's sources from their beginning; each process reads the groups of rows that its devices
        need.
        """
        return self.reader(self.streams(), self.config.data.workers)

    def reader(self, streams: list[Stream], workers: int = 0) -> GroupedBatches:
        """Batches of `streams` from their beginning. `workers`: number of processes that read ahead."""
        data, encode = self.config.data, self.row_encoder(streams)
        rows = own_rows(sharding.batch_sharding(self.mesh), encode.shape.rows)
        faults = DataFaultsConfig(data.faults.most, data.faults.strict)
        return GroupedBatches(streams, encode, data.groups, workers, data.threads, faults, rows)

    def finish(self, state: TrainState, checkpoints: CheckpointDirectory) -> TrainState:
        """The state to save at the end: the moving average becomes the parameters, and average and optimizer are
        dropped.

        If the stage trained the VLM, this saves it as the frozen weights.
        """
        done = state.replace(params=finish(state), ema={}, optimizer={})
        if program.trained_tree(self.stage) == "frozen":
            checkpoints.frozen.save(done.params)
        return done
