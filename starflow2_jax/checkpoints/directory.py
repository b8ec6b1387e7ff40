"""A checkpoint directory: enough to sample from it anywhere, restorable on another mesh than it was saved on.

config.json     the experiment's config, and the number of this format
codec.json      the codec; codec.safetensors: its weights, where it has any
tokenizer/      as `transformers` saves it
frozen/         the frozen weights (orbax), frozen.json: their content hash; vlm.json, reference_config.json: of a converted VLM
steps/<n>/      params, ema, optimizer (orbax), meta (JSON): stage, step, RNG, data position; files.json (file_list.py)
damaged/        steps that a run found damaged and passed over
inversion.json  where `starflow2 calibrate` was run: how both flows are inverted fastest
"""

import json
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from starflow2_jax.checkpoints import damage
from starflow2_jax.checkpoints.codec import restore_codec, write_codec
from starflow2_jax.checkpoints.frozen import FrozenWeights
from starflow2_jax.checkpoints.reading import CheckpointError, read_json, with_tuples
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.checkpoints.steps import Steps
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.config import loading as configs
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.errors import ConfigError, UserError

FORMAT = 2  # 2: rotary pairs are halves of a head in the flows, too; what is saved by 1 means something else here


class CheckpointDirectory:
    """What does not change during a run; `steps` and `frozen` are its weights."""

    def __init__(self, folder: str | Path, keep: Keep = Keep()):  # noqa: B008 - it is frozen
        self.folder = Path(folder).resolve()
        self.steps = Steps(self.folder, keep)
        self.frozen = FrozenWeights(self.folder)

    def exists(self) -> bool:
        return (self.folder / "config.json").is_file()

    def create(self, config: ConfigDict, codec: Codec, tokenizer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(self.folder / "tokenizer"))
        self._create(config, codec)

    def create_on(self, vlm: Path, config: ConfigDict, codec: Codec) -> None:
        """A run on a converted VLM: its weights, tokenizer and processor files are copied as they are."""
        shutil.copytree(vlm, self.folder, dirs_exist_ok=True)
        self._create(config, codec)

    def _create(self, config: ConfigDict, codec: Codec) -> None:
        write_codec(self.folder, codec)
        self.write_config(config)

    def write_config(self, config: ConfigDict) -> None:
        (self.folder / "config.json").write_text(
            json.dumps({"format": FORMAT, **config.to_dict()}, indent=1), encoding="utf-8"
        )

    def config(self) -> ConfigDict:
        """The experiment's config, locked. Raises CheckpointError."""
        values = read_json(self.folder / "config.json")
        if not isinstance(values, dict) or not {"model", "stages"} <= set(values):
            raise CheckpointError(f"{self.folder / 'config.json'} is not a config of this program")
        if (number := values.pop("format", 1)) != FORMAT:
            raise CheckpointError(
                f"{self.folder} has the checkpoint format {number}, but this version of starflow2 reads {FORMAT}, in which the "
                "same weights mean something else; use the version that wrote it, or train again"
            )
        try:
            return configs.complete(with_tuples(values))
        except ConfigError as error:
            raise CheckpointError(f"{self.folder / 'config.json'} is no config of this version: {error}") from None

    def codec(self) -> Codec:
        """Raises CheckpointError."""
        values = read_json(self.folder / "codec.json")
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.folder / 'codec.json'} is not a codec of this program")
        try:
            return restore_codec(self.folder, with_tuples(values))
        except UserError as error:
            raise CheckpointError(str(error)) from None

    def tokenizer(self):
        """A `transformers` tokenizer. Raises CheckpointError."""
        path = self.folder / "tokenizer"
        try:
            return tokenizers.load(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} holds no readable tokenizer ({reason})") from None

    def require_latest(self) -> int:
        """The newest step that is whole, to sample from; newer damaged steps are named on stderr.

        The optimizer's files, which are most of a step, are not checked. Raises CheckpointError.
        """
        read_json(self.folder / "config.json")
        number, _ = damage.newest_whole(self.steps, unread=("optimizer",))
        if number is None:
            raise CheckpointError(f"{self.folder} holds no saved step yet; train first")
        return number
