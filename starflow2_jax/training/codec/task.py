"""The stages of a codec's training as tasks of the loop: rows of CODEC_STAGES, made from the config."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Wrapped
from optax import GradientTransformation

from starflow2_jax.checkpoints.codec import write_codec
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.fae import FaeCodec, read_fae
from starflow2_jax.config.codec import CodecStageConfig, encoder_config, networks_config
from starflow2_jax.data.faults import DataFaultsConfig
from starflow2_jax.data.groups import GroupedBatches, own_rows
from starflow2_jax.data.mixture import Stream
from starflow2_jax.errors import ConfigError, storage_errors
from starflow2_jax.fields import build, differences
from starflow2_jax.models.lpips import Lpips
from starflow2_jax.parallel import processes, sharding
from starflow2_jax.random_streams import stream_key
from starflow2_jax.sequence import Sequence
from starflow2_jax.stages import CODEC_STAGES, CodecStage
from starflow2_jax.training import program
from starflow2_jax.training.codec import pictures
from starflow2_jax.training.codec.adversary import Adversary
from starflow2_jax.training.codec.flops import codec_flops
from starflow2_jax.training.codec.networks import Networks
from starflow2_jax.training.codec.step import CodecState, make_step
from starflow2_jax.training.faults import guarded
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.weights.lpips import load_lpips

LEAST_STD = 1e-6  # of a latent channel


class CodecTask:
    """A stage of a codec's training as a `task.Task`."""

    def __init__(self, config: Any, stage: CodecStage, mesh: Mesh):
        self.config, self.stage, self.mesh = config, stage, mesh
        self.name = stage.name
        self.cfg = build(CodecStageConfig, config.stages[stage.name].to_dict(), f"stages.{stage.name}")
        self.steps = self.cfg.steps
        self.networks = Networks(networks_config(config), config.encoder.kind, encoder_config(config))

    @cached_property
    def optimizer(self) -> GradientTransformation:
        """The optimizer that the config names for the stage."""
        return make_optimizer(self.cfg.optimizer, self.steps)

    @cached_property
    def adversary(self) -> Adversary | None:
        """The discriminator, if the stage has one."""
        cfg = self.cfg.critic
        return None if cfg.kind == "none" else Adversary(self.networks, cfg, make_optimizer(cfg.optimizer, self.steps))

    @property
    def flops(self) -> float:
        """FLOP of one step, all devices together, by the formula of flops.py."""
        return codec_flops(self.networks, self.stage, self.cfg).total

    def check(self) -> None:
        """Raises UserError for rows that do not fit the mesh, arrays that do not fit the devices' memory, or a source
        or file that cannot be opened."""
        self.require_rows()
        program.require_room((self.abstract_state(), self.abstract_frozen(), self.abstract_batch()), self.mesh)
        self.streams()
        self._lpips()

    def require_rows(self) -> None:
        """Raises ConfigError for rows that do not fit the mesh."""
        if self.cfg.rows % (spread := sharding.row_shards(self.mesh) * self.cfg.accumulate):
            raise ConfigError(
                f"stages.{self.name}.rows={self.cfg.rows} must be a multiple of {spread}, which is mesh.data x "
                f"mesh.fsdp x accumulate"
            )

    def check_batch(self, batch: Sequence) -> None:
        """Every batch has pictures."""

    def continues(self, name: str) -> bool:
        """Whether the stage `name` has the same groups of parameters."""
        return name in CODEC_STAGES and CODEC_STAGES[name].groups == self.stage.groups

    def _state(self, params: dict, key: jax.Array) -> CodecState:
        moving = self.stage.trained(params)
        critic, critic_optimizer = {}, {}
        if self.adversary:
            critic = self.adversary.initial(jax.random.fold_in(key, 2**31 - 1))
            critic_optimizer = self.adversary.optimizer.init(critic["network"])
        ema, optimizer = jax.tree.map(jnp.copy, moving), self.optimizer.init(moving)
        return CodecState(jnp.zeros((), jnp.int32), key, params, ema, optimizer, critic, critic_optimizer)

    def _key(self) -> jax.Array:
        return stream_key(self.config.seed, "codec", self.name)

    def _fresh(self) -> dict:
        return self.networks.initial(stream_key(self.config.seed, "codec"), self.stage.groups)

    def abstract_state(self) -> CodecState:
        """Shapes, types and shardings of the state."""
        shapes = jax.eval_shape(lambda: self._state(self._fresh(), self._key()))
        return sharding.placed(shapes, sharding.tree_shardings(shapes, self.mesh))

    def abstract_batch(self) -> Sequence:
        """Shapes, types and shardings of a batch."""
        return sharding.placed(
            pictures.abstract_batch(self.networks.cfg, self.cfg.rows), sharding.batch_sharding(self.mesh)
        )

    def new_state(self, params: dict | None) -> CodecState:
        """The state before the first step, with `params` (on their shards), or fresh ones and those of
        `config.start`.
        """
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        if params is None:
            given = self._given()
            params = jax.jit(self._fresh, out_shardings=layout.params)() | {
                name: jax.device_put(tree, layout.params[name]) for name, tree in given.items()
            }
        return jax.jit(lambda params: self._state(params, self._key()), out_shardings=layout)(params)

    def _given(self) -> dict:
        """The groups of parameters that the codec in the folder `config.start` has."""
        if not self.config.start or self.name == "encoder":
            return {}
        codec = started(self.config)
        found = {name: codec.weights[name] for name in self.stage.groups if name in codec.weights}
        if codec.networks.channels:
            statistics = {"mean": codec.mean, "std": codec.std}
            found["statistics"] = {name: np.asarray(values, np.float32) for name, values in statistics.items()}
        return found

    def _lpips(self) -> dict:
        if not (self.stage.pixels and self.cfg.losses.lpips):
            return {}
        return {"lpips": load_lpips(self.config.lpips_vgg, self.config.lpips_linear)}

    def frozen(self, checkpoints: CheckpointDirectory) -> dict:
        """The frozen encoder, and LPIPS's network if the stage needs it. Raises ConfigError if there is no encoder
        yet.
        """
        if self.name == "encoder":
            return {}
        if not checkpoints.frozen.exists():
            raise ConfigError(
                f"stage {self.name} needs an encoder; name its folder in encoder.path, or run the stage encoder"
            )
        wanted = self.abstract_frozen()
        found = checkpoints.frozen.restore({"encoder": wanted["encoder"]})
        own = self._lpips()
        return found | jax.device_put(own, sharding.tree_shardings(own, self.mesh))

    def abstract_frozen(self) -> dict:
        """Shapes, types and shardings of what `frozen` gives."""
        if self.name == "encoder":
            return {}
        shapes = jax.eval_shape(lambda: self.networks.initial(jax.random.key(0), ("encoder",)))
        if self.stage.pixels and self.cfg.losses.lpips:
            pictures = jnp.zeros((1, 16, 16, 3))
            shapes["lpips"] = jax.eval_shape(Lpips().init, jax.random.key(0), pictures, pictures)["params"]
        return sharding.abstract(shapes, self.mesh)

    def step(self) -> Wrapped:
        """The step function, which is compiled when it is first called."""
        step = make_step(self.networks, self.stage, self.cfg, self.optimizer, self.adversary)
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(guarded(step, self.config.faults), donate_argnums=0, out_shardings=(layout, None))

    def streams(self) -> list[Stream]:
        """The sources of this stage, opened. Raises UserError."""
        return pictures.streams(self.config, self.name, self.networks.cfg)

    def batches(self) -> GroupedBatches:
        """Batches of the config's sources from their beginning; each process reads the groups of rows that its devices
        need.
        """
        return self.reader(self.streams(), self.config.data.workers)

    def reader(self, streams: list[Stream], workers: int = 0, labelled: bool = False) -> GroupedBatches:
        """The same of other streams. `workers`: processes that read ahead. `labelled`: pictures have labels."""
        data, encode = self.config.data, pictures.row_encoder(self.networks.cfg, self.cfg.rows, labelled)
        rows = own_rows(sharding.batch_sharding(self.mesh), self.cfg.rows)
        faults = DataFaultsConfig(data.faults.most, data.faults.strict)
        return GroupedBatches(streams, encode, data.groups, workers, data.threads, faults, rows)

    def finish(self, state: CodecState, checkpoints: CheckpointDirectory) -> CodecState:
        """The state to save at the end: the moving average becomes the parameters, and all else is dropped.

        `encoder` saves the frozen encoder, stages that train the latent encoder measure the latents' statistics, and
        the last stage writes the codec into the directory, which is then a codec's folder.
        """
        params = state.params | state.ema
        if self.name == "encoder":
            checkpoints.frozen.save({"encoder": params["encoder"]})
            return state.replace(params={}, ema={}, optimizer={})
        frozen = self.frozen(checkpoints)
        if "latent_encoder" in self.stage.trains:
            found = self._statistics(params | frozen)
            params |= {"statistics": jax.device_put(found, sharding.replicated(self.mesh))}
        if self.name == self.config.order[-1]:
            self._write(checkpoints.folder, params | {"encoder": frozen["encoder"]})
        return state.replace(params=params, ema={}, optimizer={}, critic={}, critic_optimizer={})

    def _statistics(self, params: dict) -> dict[str, np.ndarray]:
        """Mean and standard deviation (D,) of the latents' means over the first pictures of the training set."""

        def moments(params: dict, batch: Sequence) -> tuple[jax.Array, jax.Array]:
            x = self.networks.features(params, pictures.pixels(batch, self.networks.cfg))
            mean, _ = self.networks.gaussian(params, x)
            return jnp.mean(mean, (0, 1)), jnp.mean(mean**2, (0, 1))

        reader, layout, measure = self.batches(), sharding.batch_sharding(self.mesh), jax.jit(moments)
        sums = np.zeros((2, self.networks.cfg.channels))
        for _ in range(self.config.measured):
            sums += np.stack([np.asarray(x, np.float64) for x in measure(params, reader.place(next(reader), layout))])
        reader.close()
        mean, square = sums / self.config.measured
        std = np.sqrt(np.maximum(square - mean**2, LEAST_STD**2))
        return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}

    def _write(self, folder: Path, params: dict) -> None:
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        params = jax.tree.map(np.asarray, params)
        statistics, n = params.pop("statistics"), self.networks
        mean, std = (tuple(map(float, statistics[name])) for name in ("mean", "std"))
        codec = FaeCodec(n.cfg, n.encoder_kind, n.encoder, n.cfg.grid, mean, std, params)
        with storage_errors(folder):
            processes.on_primary(partial(write_codec, folder, codec))


def held_whole(config: Any, mesh: Mesh) -> str:
    """Says which parameters every device holds whole although they should be cut; "" if there are none, see
    `sharding`.
    """
    networks = Networks(networks_config(config), config.encoder.kind, encoder_config(config))
    groups = sorted({"encoder", *(group for name in config.order for group in CODEC_STAGES[name].groups)})
    return sharding.held_whole(jax.eval_shape(lambda: networks.initial(jax.random.key(0), tuple(groups))), mesh.shape)


def started(config: Any) -> FaeCodec:
    """The codec in the folder `config.start`. Raises UserError if the config's networks and encoder are not the
    same.
    """
    codec = read_fae(Path(config.start))
    here = networks_config(config)
    parts = [("networks.pixel_decoder", codec.networks.pixel_decoder, here.pixel_decoder)]
    if codec.networks.channels:
        parts = [("networks", codec.networks, here)]
    parts.append(("encoder", codec.encoder, encoder_config(config)))
    for name, there, own in parts:
        if other := differences(there, own, f"{name}."):
            raise ConfigError(
                f"{config.start} holds another codec than the config: its {', '.join(other)}; change the config"
            )
    return codec
