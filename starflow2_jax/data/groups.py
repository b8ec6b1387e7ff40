"""Row groups: each host reads only its share of the documents, and batches are the same on any number of hosts."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from starflow2_jax.data.documents import Documents
from starflow2_jax.data.pipeline import Encoder, batches
from starflow2_jax.errors import ConfigError
from starflow2_jax.parallel import processes
from starflow2_jax.sequence import Sequence, Shape


class GroupedBatches:
    """Endless batches whose rows are divided into `groups` equal groups.

    Group g packs the documents g, g + groups, g + 2 groups, ... of the endlessly repeated source into its own rows. A
    group's rows therefore depend on no other group and on no host, and a host packs only the groups that its devices
    need. (One packer for all rows would make every host read and encode every document.) More groups allow more hosts;
    but with fewer rows per group the packer has less choice, and rows end with a little more padding.

    rows: the rows that this host feeds; None: all. threads: that read ahead, shared by the groups of this host.
    """

    def __init__(
        self,
        source: Documents,
        encoder: Encoder,
        shape: Shape,
        groups: int = 1,
        threads: int = 0,
        rows: Iterable[int] | None = None,
    ):
        self.rows, self.per_group, self.groups = shape.rows, rows_of_a_group(shape.rows, groups), groups
        self.documents = len(source)
        block = replace(shape, rows=self.per_group)
        mine = sorted({row // self.per_group for row in (range(shape.rows) if rows is None else rows)})
        threads = max(1, threads // len(mine)) if threads else 0
        self._readers = {g: iter(batches(source, encoder, block, threads, g, groups)) for g in mine}

    def __next__(self) -> dict[int, Sequence]:
        """The next batch: group -> its rows as NumPy arrays, for the groups that this host reads."""
        return {group: next(reader) for group, reader in self._readers.items()}

    def get_state(self) -> dict[str, list]:
        """The position of every group. All processes call this together, because each knows only its own groups."""
        mine = {str(group): reader.get_state() for group, reader in self._readers.items()}
        known = {group: state for states in processes.gather(mine) for group, state in states.items()}
        return {"groups": [known.get(str(group)) for group in range(self.groups)]}

    def set_state(self, state: dict) -> None:
        """Continue from a position that any number of hosts saved. Raises ConfigError for another number of groups."""
        states = state["groups"]
        if len(states) != self.groups:
            raise ConfigError(f"the checkpoint's data position has {len(states)} groups; set data.groups={len(states)}")
        for group, reader in self._readers.items():
            reader.set_state(states[group])

    def place(self, blocks: dict[int, Sequence], sharding: NamedSharding) -> Sequence:
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
