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
import math
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from starflow2_jax.checkpoints import file_list
from starflow2_jax.checkpoints.codec import restore_codec, write_codec
from starflow2_jax.checkpoints.content_hash import content_hash
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.errors import UserError
from starflow2_jax.models.jacobi import Jacobi, Schedule
from starflow2_jax.parallel import processes, sharding

FORMAT = 2  # 2: rotary pairs are halves of a head in the flows, too; what is saved by 1 means something else here
TREES = ("params", "ema", "optimizer")  # of a step


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or another program's; the message is one sentence."""


class CheckpointDirectory:
    def __init__(self, folder: str | Path, keep: Keep = Keep()):  # noqa: B008 - it is frozen
        self.folder = Path(folder).resolve()
        self._keep = keep
        self._manager = None
        self._lister: threading.Thread | None = None

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._keep.policy(),
                single_host_load_and_broadcast=True,  # process 0 says which steps there are
            )
            self._manager = ocp.CheckpointManager(self.folder / "steps", options=options)
        return self._manager

    # What does not change during a run.

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
        (self.folder / "config.json").write_text(json.dumps({"format": FORMAT, **config.to_dict()}, indent=1))

    def config(self) -> ConfigDict:
        values = self._json("config.json")
        if not isinstance(values, dict) or not {"model", "stages"} <= set(values):
            raise CheckpointError(f"{self.folder / 'config.json'} is not a config of this program")
        if (number := values.pop("format", 1)) != FORMAT:
            raise CheckpointError(
                f"{self.folder} has the checkpoint format {number}, but this version of starflow2 reads {FORMAT}, in which the "
                "same weights mean something else; use the version that wrote it, or train again"
            )
        return ConfigDict(_tuples(values)).lock()

    def codec(self) -> Codec:
        values = self._json("codec.json")
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.folder / 'codec.json'} is not a codec of this program")
        try:
            return restore_codec(self.folder, _tuples(values))
        except UserError as error:
            raise CheckpointError(str(error)) from None

    def tokenizer(self):
        try:
            return tokenizers.load(self.folder / "tokenizer")
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def write_inversion(self, report: dict) -> None:
        (self.folder / "inversion.json").write_text(json.dumps(report, indent=1))

    def inversion(self, blocks: int, step: int | None = None) -> Schedule | None:
        """How each of `blocks` blocks, the deep flow the last, is inverted: inversion.json's solvers, or None without one.

        That it was measured at another step than `step` is said on stderr.
        """
        path = self.folder / "inversion.json"
        if not path.exists():
            return None
        values = self._json(path.name)
        try:
            schedule = tuple(Jacobi(**block["solver"]) for block in values["blocks"])
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); remove it and calibrate again") from None
        if len(schedule) != blocks:
            raise CheckpointError(
                f"{path} is of flows of {len(schedule)} blocks, not {blocks}; remove it and calibrate again"
            )
        if step is not None and values.get("step") != step:
            print(
                f"WARNING: {path} was measured at step {values.get('step')}, not {step}; calibrate again",
                file=sys.stderr,
            )
        return schedule

    def _json(self, name: str):
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no checkpoint directory {self.folder}")
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder} is not a checkpoint of this program: it has no {name}") from None
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.folder / name} is damaged ({error}); restore it from a copy") from None

    # The frozen weights.

    def save_frozen(self, frozen: dict) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / "frozen", frozen, force=True)
        content = json.dumps({"content_hash": content_hash(frozen)})
        processes.on_primary(lambda: (self.folder / "frozen.json").write_text(content))

    def restore_frozen(self, abstract: dict) -> dict:
        """`abstract`: shapes and shardings; types stay as they were saved. The content hash is checked."""
        wanted = self._json("frozen.json")
        wanted = wanted.get("content_hash") if isinstance(wanted, dict) else None
        if not isinstance(wanted, str):
            raise CheckpointError(f"{self.folder / 'frozen.json'} holds no content hash; restore it from a copy")
        with ocp.StandardCheckpointer(restore_concurrent_gb=_reading(abstract)) as checkpointer:

            def read():
                saved = checkpointer.metadata(self.folder / "frozen").item_metadata.tree
                typed = jax.tree.map(lambda x, s: x.update(dtype=s.dtype), abstract, saved)
                return checkpointer.restore(self.folder / "frozen", typed)

            frozen = self._read(read, "frozen weights")
        if content_hash(frozen) != wanted:
            raise CheckpointError(
                f"the frozen weights in {self.folder} are not those it was trained on (content hash differs)"
            )
        return frozen

    # The steps.

    def save(self, number: int, trees: dict[str, dict], meta: dict, metrics: dict[str, float] | None = None) -> None:
        """`trees`: "params", "ema", "optimizer"; `metrics`: "stage" (its place in the order) and "loss", for Keep.best.

        Returns before the files are written; `wait` for them. All processes call it together. Raises CheckpointError where
        the directory holds this step or a later one.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        composite = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        self.wait()  # for the step before: orbax would wait for it now, too
        if not self.manager.save(number, args=composite, metrics=metrics):
            raise CheckpointError(
                f"step {number} cannot be saved in {self.folder}, which holds step {self.manager.latest_step()} already; move "
                "that and all from this number on away, or save to another directory"
            )
        if processes.primary():
            self._written = threading.Event()
            self._lister = threading.Thread(target=self._list_files, args=(number, self._written), daemon=True)
            self._lister.start()

    def wait(self) -> None:
        """Wait for the files and their list."""
        try:
            self.manager.wait_until_finished()
        finally:
            if self._lister is not None:
                self._written.set()
                self._lister.join()
                self._lister = None

    def _list_files(self, number: int, written: threading.Event) -> None:
        """Beside the training: when step `number` is whole, it and any other without one get their lists of files."""
        while not (self._step(number).is_dir() or written.wait(1)):
            pass
        for step in self.manager.all_steps():  # an old one leaves them before orbax deletes its files
            if self._step(step).is_dir() and not file_list.has(self._step(step)):
                file_list.write(self._step(step))

    def close(self) -> None:
        """Wait for the files, and let go of the directory."""
        self.wait()
        self.manager.close()
        self._manager = None

    def latest(self) -> int | None:
        """The newest step: of those that process 0 found when all made the manager together, and those saved since."""
        if self._manager is None and not processes.on_primary(self.exists):
            return None
        return self.manager.latest_step()

    def require_latest(self) -> int:
        """The newest step that is whole, to sample from; what is wrong with newer ones is said on stderr.

        Its optimizer, which is most of it, is not looked at. Raises CheckpointError.
        """
        self._json("config.json")
        number, _ = self._newest_whole(unread=("optimizer",))
        if number is None:
            raise CheckpointError(f"{self.folder} holds no saved step yet; train first")
        return number

    def pass_over_damaged(self) -> None:
        """Before a run goes on: newer steps than the newest whole one are moved to damaged/, and said on stderr.

        All processes call it together. Raises CheckpointError where there are steps and none is whole.
        """
        processes.on_primary(lambda: [self._put_away(number) for number in self._newest_whole()[1]])
        if self._manager is not None:
            self._manager.reload()

    def pass_over_unreadable(self, mesh: jax.sharding.Mesh) -> None:
        """After `pass_over_damaged`: is the newest step one without a list of files, since the run was killed before that was
        written, it is read; if it cannot be, it is moved to damaged/, said on stderr, and the one before is looked at.

        All processes call it together, each reads its shards. Raises CheckpointError where no other step is left.
        """
        while (number := self.latest()) is not None:
            if processes.on_primary(partial(file_list.has, self._step(number))):
                return
            faults = [fault for fault in processes.gather(self._unreadable(number, mesh)) if fault]
            if not faults:
                return
            if len(self.manager.all_steps()) == 1:
                raise CheckpointError(f"{faults[0]}, and there is no other step; restore it from a copy")
            print(f"WARNING: {faults[0]}; looking at the step before", file=sys.stderr)
            processes.on_primary(partial(self._put_away, number))
            self.manager.reload()

    def _unreadable(self, number: int, mesh: jax.sharding.Mesh) -> str | None:
        """What is wrong with a step's arrays, as far as reading them tells."""
        items = [item for item in TREES if self.has(number, item)]
        with ocp.StandardCheckpointer() as checkpointer:
            for item in items:
                try:
                    self._read(partial(_restore_all, checkpointer, self._step(number) / item, mesh), f"step {number}")
                except CheckpointError as error:
                    return str(error)
        return None

    def _put_away(self, number: int) -> None:
        places = (self.folder / "damaged" / f"{number}.{i}" for i in range(10**6))
        place = next(place for place in places if not place.exists())
        place.parent.mkdir(exist_ok=True)
        self._step(number).rename(place)

    def _newest_whole(self, unread: tuple[str, ...] = ()) -> tuple[int | None, list[int]]:
        """The newest step that is whole, and the damaged ones after it. `unread`: items that are not looked at."""
        damaged = []
        for number in sorted(self._steps(), reverse=True):
            if (fault := self._fault(number, unread)) is None:
                return number, damaged
            damaged.append(number)
            print(
                f"WARNING: step {number} in {self.folder} is damaged ({fault}); looking at the one before",
                file=sys.stderr,
            )
        if damaged:
            raise CheckpointError(
                f"every saved step in {self.folder} is damaged ({', '.join(map(str, damaged))}); restore one from a copy"
            )
        return None, []

    def _steps(self) -> list[int]:
        folder = self.folder / "steps"
        return [int(step.name) for step in folder.iterdir() if step.name.isdigit()] if folder.is_dir() else []

    def _fault(self, number: int, unread: tuple[str, ...]) -> str | None:
        if fault := file_list.fault(self._step(number), unread):
            return fault
        path = self._step(number) / "meta" / "metadata"  # also of a step without a list of its files
        try:
            json.loads(path.read_text())
        except (OSError, ValueError) as error:
            return f"{path.name} of meta cannot be read: {error}"
        return None

    def _step(self, number: int) -> Path:
        return self.folder / "steps" / str(number)

    def meta(self, number: int) -> dict:
        restored = self._read(
            lambda: self.manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore())), f"step {number}"
        )
        return restored["meta"]

    def has(self, number: int, item: str) -> bool:
        return processes.on_primary((self._step(number) / item).is_dir)

    def restore(self, number: int, abstract: dict[str, dict]) -> dict[str, dict]:
        """Restore the named trees, placed as `abstract` (shapes and shardings) says."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items() if jax.tree.leaves(tree)}
        restored = self._read(lambda: self.manager.restore(number, args=ocp.args.Composite(**items)), f"step {number}")
        return {name: restored[name] if name in items else tree for name, tree in abstract.items()}

    def _read(self, read: Callable, what: str):
        try:
            return read()
        except Exception as error:  # for damaged files orbax raises what not, bare Exception included
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(
                f"{what} in {self.folder} cannot be restored: it is incomplete, damaged or of another model ({reason})"
            ) from None


def abstract(tree, mesh: jax.sharding.Mesh):
    """Shapes with the shardings of sharding.PARAMETER_RULES."""
    return sharding.placed(tree, sharding.tree_shardings(tree, mesh))


def _restore_all(checkpointer: ocp.StandardCheckpointer, item: Path, mesh: jax.sharding.Mesh):
    """Whatever trees it holds, spread over a mesh."""
    return checkpointer.restore(item, abstract(checkpointer.metadata(item).item_metadata.tree, mesh))


def _reading(tree: dict) -> int:
    """GB to read at a time: enough for the largest shard; without a limit orbax buffers nearly a second model."""
    shards = (x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in jax.tree.leaves(tree))
    return 1 + int(2 * max((4 * math.prod(shape) for shape in shards), default=0) / 1e9)


def _tuples(values):
    """JSON has no tuples: lists, at any depth, become tuples."""
    if isinstance(values, dict):
        return {k: _tuples(v) for k, v in values.items()}
    return tuple(_tuples(v) for v in values) if isinstance(values, list) else values
