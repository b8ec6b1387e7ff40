"""Row groups: each host reads only its share of the documents, and batches are the same on any number of hosts."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from starflow2_jax.data.faults import DataFaultsConfig, judge
from starflow2_jax.data.mixture import Block, Bundle, Stream, in_process
from starflow2_jax.data.pipeline import RowEncoder
from starflow2_jax.errors import ConfigError
from starflow2_jax.parallel import processes
from starflow2_jax.sequence import Sequence as SequenceRows

FORMAT = 2  # of a saved position


class GroupedBatches:
    """Endless batches whose rows are divided into `groups` equal groups.

    Group g packs the documents g, g + groups, g + 2 groups, ... of each endlessly repeated source into its own rows. A
    group's rows therefore depend on no other group and on no host, and a host packs only the groups that its devices
    need. (One packer for all rows would make every host read and encode every document.) More groups allow more hosts;
    but with fewer rows per group the packer has less choice, and rows end with a little more padding.

    workers: number of processes that read ahead, at most one per group of this host; 0: none. threads: number of
    threads that read ahead in each of these processes, or in this process if there are none. faults: when skipped
    documents end the run. rows: the rows that this host feeds; None: all. What the batches hold depends on none of
    these four.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        encode: RowEncoder,
        groups: int = 1,
        workers: int = 0,
        threads: int = 0,
        faults: DataFaultsConfig = DataFaultsConfig(),  # noqa: B008 - it is frozen
        rows: Iterable[int] | None = None,
    ):
        self.rows, self.groups = encode.shape.rows, groups
        self.per_group = rows_of_a_group(self.rows, groups)
        self.documents = {stream.name: len(stream.source) for stream in streams}
        self.faults = faults
        block = replace(encode.shape, rows=self.per_group)
        self._streams, self._encode = streams, RowEncoder(encode.encoder, block)
        self._own = sorted({row // self.per_group for row in (range(self.rows) if rows is None else rows)})
        self._workers, self._threads = min(workers, len(self._own)), threads
        self._states: dict[int, Any] = {}
        self._last: dict[int, Block] = {}
        self._said: set[str] = set()
        self._readers: list[grain.DatasetIterator] | None = None

    def __next__(self) -> dict[int, SequenceRows]:
        """The next batch: group -> its rows as NumPy arrays, for the groups that this host reads."""
        if self._readers is None:
            self._readers = self._begin()
        blocks = {group: block for reader in self._readers for group, block in next(reader).items()}
        self._last = dict(sorted(blocks.items()))
        self._states |= {group: block.state for group, block in blocks.items()}
        for block in blocks.values():
            for key in block.faults.keys() - self._said:
                self._said.add(key)
                print(f"WARNING: {block.faults[key]}; more of this kind are only counted", file=sys.stderr)
        return {group: block.rows for group, block in self._last.items()}

    def _begin(self) -> list[grain.DatasetIterator]:
        parts = max(self._workers, 1)
        bundles = [
            Bundle(self._streams, self._encode, self._own[i::parts], self.groups, self._threads, dict(self._states))
            for i in range(parts)
        ]
        return [iter(in_process(bundle) if self._workers else bundle) for bundle in bundles]

    def close(self) -> None:
        """End the processes that read ahead. Reading again starts them at the same position."""
        for reader in self._readers or ():
            reader.close()
        self._readers = None

    def restart(self) -> None:
        """Begin again with the first documents."""
        self.close()
        self._states, self._last = {}, {}

    @property
    def ended(self) -> bool:
        """Whether the last batch is empty on this host, because all documents were read before or none can be used."""
        return all(block.ended or block.given_up for block in self._last.values())

    def check(self) -> dict[str, int]:
        """Counts of the documents that were read, by source ("NAME"), and of skipped ones ("NAME/KIND").

        All processes call this together. Raises DataFaultsError, in every process, if too many were skipped.
        """
        blocks = self._last.values()
        own = {
            "counts": sum((Counter(block.counts) for block in blocks), Counter()),
            "faults": {key: message for block in blocks for key, message in block.faults.items()},
            "given_up": any(block.given_up for block in blocks),
        }
        all_hosts = processes.gather(own)
        counts = sum((Counter(host["counts"]) for host in all_hosts), Counter())
        faults = {key: message for host in reversed(all_hosts) for key, message in host["faults"].items()}
        judge(counts, faults, any(host["given_up"] for host in all_hosts), self.faults)
        return dict(sorted(counts.items()))

    def get_state(self) -> dict[str, Any]:
        """The position of every group. All processes call this together, because each knows only its own groups."""
        mine = {str(group): state for group, state in self._states.items()}
        known = {group: state for states in processes.gather(mine) for group, state in states.items()}
        return {"format": FORMAT, "groups": [known.get(str(group)) for group in range(self.groups)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position that any number of hosts saved.

        Raises ConfigError for another number of groups, and for the position of an older version.
        """
        if state.get("format") != FORMAT:
            raise ConfigError(
                "the checkpoint's data position is of an older version of this program; finish the stage with that "
                "version, or start it anew in another --out"
            )
        if len(state["groups"]) != self.groups:
            count = len(state["groups"])
            raise ConfigError(f"the checkpoint's data position has {count} groups; set data.groups={count}")
        self.close()
        self._states = {group: state["groups"][group] for group in self._own}

    def place(self, blocks: dict[int, SequenceRows], sharding: NamedSharding) -> SequenceRows:
        """Make one batch of global arrays; each process contributes the rows of its own devices."""
        order = list(blocks)

        def leaf(*parts: np.ndarray) -> jax.Array:
            held = dict(zip(order, parts, strict=True))
            shape = (self.rows, *parts[0].shape[1:])
            return jax.make_array_from_callback(shape, sharding, partial(self._piece, held))

        return jax.tree.map(leaf, *blocks.values())

    def _piece(self, held: dict[int, np.ndarray], index: Any) -> np.ndarray:
        """The rows of the slices `index` from the groups that this host holds."""
        first, last, _ = index[0].indices(self.rows)
        groups = range(first // self.per_group, (last - 1) // self.per_group + 1)
        rows = np.concatenate([held[g] for g in groups]) if len(groups) > 1 else held[groups[0]]
        offset = groups[0] * self.per_group
        return rows[(slice(first - offset, last - offset), *index[1:])]


def rows_of_a_group(rows: int, groups: int) -> int:
    """Rows per group. Raises ConfigError if `groups` does not divide a batch's rows."""
    if groups < 1 or rows % groups:
        raise ConfigError(f"data.groups={groups} must divide the batch's {rows} rows")
    return rows // groups


def own_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """The rows of a batch that this process's devices hold."""
    places: Any = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (where,) in places for row in range(*where.indices(rows))})
