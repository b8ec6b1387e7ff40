"""Trains a codec in a checkpoint directory, with the loop that trains STARFlow2."""

from functools import partial
from pathlib import Path
from typing import Any

import jax

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.codecs.fae import read_fae
from starflow2_jax.codecs.folder import DESCRIPTION
from starflow2_jax.config import loading as configs
from starflow2_jax.config.codec import encoder_config, networks_config
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import differences
from starflow2_jax.parallel import processes, sharding
from starflow2_jax.stages import CODEC_STAGES
from starflow2_jax.training.codec.task import CodecTask, held_whole, started
from starflow2_jax.training.loop import Trainer
from starflow2_jax.weights.dinov2 import load_dinov2
from starflow2_jax.weights.siglip import load_siglip

LOADERS = {"dinov2": load_dinov2, "siglip": load_siglip}  # kind of encoder -> reader of a folder of transformers


class CodecTrainer(Trainer):
    """Trains the stages of a codec's config. The directory holds the frozen encoder, and at the end the codec."""

    def __init__(self, config: Any, folder: str | Path):
        """Open the directory `folder`, or prepare to make it; `run` writes it. Raises errors as `Trainer` does."""
        self.config = config = configs.complete(config)
        self.checkpoints = CheckpointDirectory(folder, Keep(config.keep, config.keep_every, config.keep_best))
        processes.on_primary(self.checkpoints.lock.require_free)
        axes = config.mesh
        self.mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, sequence=axes.sequence)
        self.encoder: dict | None = None  # the frozen one, until the directory holds it
        self.begun = processes.on_primary(self.checkpoints.exists)
        if self.begun:
            saved = self.checkpoints.config(configs.CODEC)
            other = differences(networks_config(saved), networks_config(config), "networks.")
            if other := other + differences(encoder_config(saved), encoder_config(config), "encoder."):
                raise ConfigError(
                    f"{folder} holds another codec than the config: its {', '.join(other)}; change the config, or name "
                    f"another --out"
                )

    def task(self, name: str) -> CodecTask:
        """The task of the stage `name`."""
        return CodecTask(self.config, CODEC_STAGES[name], self.mesh)

    def _require_stages(self) -> None:
        super()._require_stages()
        if not self.begun and "encoder" not in self.config.order:
            self.encoder = frozen_encoder(self.config)

    def _create(self) -> None:
        encoder, self.encoder = self.encoder, None
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        if encoder is not None:
            placed = jax.device_put(encoder, sharding.tree_shardings(encoder, self.mesh))
            self.checkpoints.frozen.save({"encoder": placed})
        processes.on_primary(partial(self.checkpoints.write_config, self.config))

    def _held_whole(self) -> str:
        return held_whole(self.config, self.mesh)


def frozen_encoder(config: Any) -> dict:
    """The parameters of the encoder that `encoder.path` or `start` names. Raises UserError."""
    if config.encoder.path:
        folder = Path(config.encoder.path)
        if (folder / DESCRIPTION).is_file():
            codec = read_fae(folder)
            found, params = codec.encoder, codec.weights["encoder"]
        elif config.encoder.kind in LOADERS:
            found, params = LOADERS[config.encoder.kind](folder)
        else:
            raise ConfigError(
                f"encoder.path={folder} must be a codec's folder, because encoder.kind is {config.encoder.kind!r}"
            )
        if other := differences(found, encoder_config(config), "encoder."):
            raise ConfigError(
                f"{folder} holds another encoder than the config: its {', '.join(other)}; change the config"
            )
        return params
    if config.start:
        return started(config).weights["encoder"]
    raise ConfigError(
        "there is no encoder; set encoder.path to its folder or start to a codec's folder, or put the stage encoder "
        "first in order"
    )
