"""Sources, shuffled and mixed, -> packed rows: deterministic, from a position that can be saved, with faults
counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from starflow2_jax import sequence
from starflow2_jax.data.documents import Document, DocumentError
from starflow2_jax.data.pipeline import RowEncoder, packed, to_sequence
from starflow2_jax.data.preparation import Preparation
from starflow2_jax.data.protocol import Source

PATIENCE = 1000  # documents one after the other that cannot be used, after which a reader gives up


@dataclass(frozen=True)
class Stream:
    """A source in a mixture."""

    name: str
    weight: float
    source: Source
    prepare: Preparation
    seed: int  # of the order of the documents, of what each reading draws
    once: bool = False  # each document is read once, for documents that are held out; else epoch after epoch


@dataclass(frozen=True)
class Loaded:
    """A document that was read, with its features; or (without them) what is wrong with it."""

    source: str
    document: Document | None = None
    features: dict[str, np.ndarray] | None = None
    kind: str = ""  # of the fault
    message: str = ""


@dataclass(frozen=True)
class Block:
    """Rows of one group, and what was read for them."""

    rows: sequence.Sequence
    counts: dict[str, int]  # documents since the beginning: those of "NAME", and those skipped of "NAME/KIND"
    faults: dict[str, str]  # "NAME/KIND" -> the first such fault that this reader saw
    given_up: bool  # PATIENCE documents one after the other could not be used; the rows are empty
    state: Any  # the position after these rows, a JSON value
    ended: bool = False  # all documents were read before; the rows are empty


class _Load:
    """Index -> Loaded. It is pickled for readers in other processes."""

    def __init__(self, stream: Stream, encode: RowEncoder):
        self.stream, self.encode = stream, encode

    def __call__(self, index: int, rng: np.random.Generator) -> Loaded:
        name = self.stream.name
        try:
            document = self.stream.prepare(self.stream.source[index], rng)
            return Loaded(name, document, self.encode(document))
        except DocumentError as error:
            message = f"document {index} of the source {name!r} is skipped: {error}"
            return Loaded(name, kind=error.kind, message=message)


class _GivenUpError(Exception):
    pass


class _Sound(grain.DatasetIterator):
    """The features of the documents that can be used; counts all documents."""

    def __init__(self, loaded: grain.DatasetIterator):
        super().__init__(loaded)
        self.counts: Counter[str] = Counter()
        self.faults: dict[str, str] = {}
        self.absent: dict[str, Any] = {}  # positions of sources that the mixture had when they were saved

    def __next__(self) -> dict[str, np.ndarray]:
        for _ in range(PATIENCE):
            found: Loaded = next(self._parent)
            self.counts[found.source] += 1
            if found.features is not None:
                return found.features
            key = f"{found.source}/{found.kind}"
            self.counts[key] += 1
            self.faults.setdefault(key, found.message)
        raise _GivenUpError

    def get_state(self) -> dict[str, Any]:
        mixed = self._parent.get_state()
        return {"mixed": mixed | {"parents": self.absent | mixed["parents"]}, "counts": dict(self.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        known = self._parent.get_state()["parents"]
        self.absent = {name: at for name, at in state["mixed"]["parents"].items() if name not in known}
        self._parent.set_state(state["mixed"])
        self.counts = Counter(state["counts"])


class _Given(grain.IterDataset):
    """A dataset that is iterated once, by an iterator that exists."""

    def __init__(self, iterator: grain.DatasetIterator):
        super().__init__()
        self.iterator = iterator

    def __iter__(self) -> grain.DatasetIterator:
        return self.iterator


def order(stream: Stream) -> grain.MapDataset:
    """The indices of a source's documents, endlessly: each epoch is a permutation of all of them, drawn anew."""
    epoch = grain.MapDataset.range(len(stream.source)).shuffle(seed=stream.seed)
    return epoch if stream.once else epoch.repeat()


def loaded(
    streams: Sequence[Stream], encode: RowEncoder, group: int = 0, groups: int = 1, threads: int = 0
) -> grain.IterDataset:
    """The endless documents of a mixture, as Loaded: of each source every `groups`-th, from document `group` on."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    parents = {
        s.name: order(s).random_map(_Load(s, encode), seed=s.seed)[group::groups].to_iter_dataset(options)
        for s in streams
    }
    return grain.IterDataset.mix(parents, {s.name: s.weight for s in streams})


class GroupRows:
    """The endless Blocks of one group: every `groups`-th document of each source, from document `group` on.

    threads: number of threads that read and encode documents ahead; 0: the caller's thread reads when it takes a block.
    state: the state of the Block after which to continue; None: from the beginning. The mixture may have changed since
        then: each source continues at its position, and a new source begins at its first document.
    """

    def __init__(
        self, streams: Sequence[Stream], encode: RowEncoder, group: int, groups: int, threads: int, state: Any = None
    ):
        self.encode, self.sound = encode, _Sound(iter(loaded(streams, encode, group, groups, threads)))
        self.reader = iter(packed(_Given(self.sound), encode))
        if state is not None:
            self.reader.set_state(state)

    def __next__(self) -> Block:
        given_up = ended = False
        try:
            rows = _filled(next(self.reader), self.encode.shape.rows)
        except _GivenUpError:
            rows, given_up = empty(self.encode), True
        except StopIteration:
            rows, ended = empty(self.encode), True
        return Block(rows, dict(self.sound.counts), self.sound.faults, given_up, self.reader.get_state(), ended)


def _filled(rows: sequence.Sequence, count: int) -> sequence.Sequence:
    """With empty rows at the end, so that there are `count`: the last documents may fill fewer."""
    return jax.tree.map(lambda x: np.pad(x, ((0, count - len(x)), *[(0, 0)] * (x.ndim - 1))), rows)


def empty(encode: RowEncoder) -> sequence.Sequence:
    """Rows that hold nothing but padding."""
    features, rows = encode.encoder([]), encode.shape.rows
    arrays = {
        name: np.zeros((rows, most, *features[name].shape[1:]), features[name].dtype)
        for name, most in encode.lengths.items()
        if name in features
    }
    for name in ("tokens", "patches"):
        if name in arrays:
            arrays[f"{name}_segment_ids"] = np.zeros(arrays[name].shape[:2], np.int32)
    return to_sequence(arrays)


class Bundle(grain.IterDataset):
    """Endless Blocks of several groups at once: group -> Block. Grain can iterate it in another process.

    own: the groups. states: as for GroupRows, by group.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        encode: RowEncoder,
        own: Sequence[int],
        groups: int,
        threads: int = 0,
        states: Mapping[int, Any] | None = None,
    ):
        super().__init__()
        self.streams, self.encode, self.own, self.groups = streams, encode, own, groups
        self.threads, self.states = threads, states or {}

    def __iter__(self) -> "_BundleIterator":
        threads = max(1, self.threads // len(self.own)) if self.threads else 0
        return _BundleIterator(
            {g: GroupRows(self.streams, self.encode, g, self.groups, threads, self.states.get(g)) for g in self.own}
        )


class _BundleIterator(grain.DatasetIterator):
    def __init__(self, readers: dict[int, GroupRows]):
        super().__init__()
        self.readers = readers

    def __next__(self) -> dict[int, Block]:
        return {group: next(reader) for group, reader in self.readers.items()}

    def get_state(self) -> dict[str, Any]:
        return {}  # each Block brings its own

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("give a Bundle its states when it is made")


def in_process(bundle: Bundle) -> grain.IterDataset:
    """The same Blocks, read ahead in a process of their own."""
    if not flags.FLAGS.is_parsed():  # grain asks for flags that only absl's own main function parses
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=2)
    return bundle.mp_prefetch(options, worker_init_fn=_leave_accelerators)


def _leave_accelerators(index: int, count: int) -> None:
    """Readers use NumPy; should one call JAX, it must not take the accelerators from the run."""
    jax.config.update("jax_platforms", "cpu")
