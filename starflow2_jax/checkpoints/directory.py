"""A checkpoint directory. It has all that sampling needs, and can be restored on another mesh than it was saved on.

config.json     the experiment's config, and the number of this format
codec.json      the codec; codec.safetensors: its weights, if it has any
tokenizer/      as `transformers` saves it
frozen/         the frozen weights (orbax); frozen.json: their content hash
vlm.json        of a converted VLM: its config; reference_config.json: the config of the published model
steps/<n>/      params, ema, optimizer (orbax); meta (JSON): stage, step, random key, data position; files.json
(file_list.py) damaged/        damaged steps that a run moved here
lock.json       the process that trains here (lock.py)
inversion.json  after `starflow2 calibrate`: the fastest way to invert both flows
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from starflow2_jax.checkpoints import damage
from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.checkpoints.codec import restore_codec, write_codec
from starflow2_jax.checkpoints.frozen import FrozenWeights
from starflow2_jax.checkpoints.lock import Lock
from starflow2_jax.checkpoints.reading import CheckpointError, read_json
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.checkpoints.steps import Steps
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.config import loading as configs
from starflow2_jax.config.schema import Config
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.errors import ConfigError, UserError, storage_errors
from starflow2_jax.parallel import processes
from starflow2_jax.text_files import with_tuples

FORMAT = (
    2  # since 2, rotary positions pair the halves of a head in the flows, too; weights of format 1 would be misread
)


class CheckpointDirectory:
    """Reads and writes the files of a checkpoint directory. Making this object touches no file.

    `steps` and `frozen` hold the weights, `lock` keeps a second run out. The other files do not change during a run.
    """

    def __init__(self, folder: str | Path, keep: Keep = Keep()):  # noqa: B008 - it is frozen
        self.folder = Path(folder).resolve()
        self.steps = Steps(self.folder, keep)
        self.frozen = FrozenWeights(self.folder)
        self.lock = Lock(self.folder)

    def exists(self) -> bool:
        """Whether the directory has been made."""
        return (self.folder / "config.json").is_file()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock during the block. All processes of a run call it together. Raises LockedError if another run
        holds it.
        """
        with contextlib.ExitStack() as stack:
            processes.on_primary(lambda: stack.enter_context(self.lock.held()))
            yield

    def create(self, config: Config, codec: Codec, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the directory of a run that pretrains its own VLM. Raises StorageError."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(str(self.folder / "tokenizer"))
        self._create(config, codec)

    def create_on(self, vlm: Path, config: Config, codec: Codec) -> None:
        """Make the directory of a run on the converted VLM in the folder `vlm`, of which all files are copied.

        Raises StorageError.
        """
        with storage_errors(self.folder):
            shutil.copytree(vlm, self.folder, dirs_exist_ok=True)
        self._create(config, codec)

    def _create(self, config: Config, codec: Codec) -> None:
        with storage_errors(self.folder):
            write_codec(self.folder, codec)
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Write config.json. Raises StorageError; then the old file stays."""
        with storage_errors(self.folder):
            write_whole(self.folder / "config.json", json.dumps({"format": FORMAT, **config.to_dict()}, indent=1))

    def config(self, kind: str = configs.STARFLOW2) -> Config:
        """The experiment's config, locked. Raises CheckpointError if it is missing, damaged, of another format or
        kind.
        """
        values = read_json(self.folder / "config.json")
        if not isinstance(values, dict) or "stages" not in values:
            raise CheckpointError(
                f"{self.folder / 'config.json'} is not a config of this program; name the directory of a run"
            )
        if (given := values.get("kind", configs.STARFLOW2)) != kind:
            raise CheckpointError(
                f"{self.folder} is a run of the kind {given!r}, not {kind!r}; name a directory of that kind"
            )
        if (number := values.pop("format", 1)) != FORMAT:
            raise CheckpointError(
                f"{self.folder} has the checkpoint format {number}, but this version of starflow2 reads format "
                f"{FORMAT}, in which the same weights mean something else; use the version that wrote it, or train "
                f"again"
            )
        try:
            return configs.complete(with_tuples(values))
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'} is not a config of this version: {error}; if a Python file of yours "
                "adds a codec, source or stage that it uses, give that file to --import"
            ) from None

    def codec(self) -> Codec:
        """The codec with its weights. Raises CheckpointError."""
        values = read_json(self.folder / "codec.json")
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.folder / 'codec.json'} is not a codec of this program")
        try:
            return restore_codec(self.folder, with_tuples(values))
        except UserError as error:
            raise CheckpointError(str(error)) from None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises CheckpointError."""
        path = self.folder / "tokenizer"
        try:
            return tokenizers.load(path)
        except ValueError as error:
            raise CheckpointError(f"{path} holds no readable tokenizer ({error}); restore it from a copy") from None

    def require_latest(self) -> int:
        """The newest whole step, to sample from. Warns on stderr of damaged steps after it.

        The optimizer's files, which are most of a step's bytes, are not checked. Raises CheckpointError if there is no
        step.
        """
        read_json(self.folder / "config.json")
        number, _ = damage.newest_whole(self.steps, unread=("optimizer",))
        if number is None:
            raise CheckpointError(f"{self.folder} holds no saved step yet; train first")
        return number
