"""Row groups: the same global batches on 1, 2 and 4 hosts, also when a position moves between them."""

import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax.data import groups as groups_module
from starflow2_jax.data.documents import Text
from starflow2_jax.data.groups import GroupedBatches, own_rows
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder, RowEncoder
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.errors import ConfigError
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import FLOW, PAD, Shape

SHAPE = Shape(8, 40, 2)


class Numbered:
    """Document i says i, at a length of its own, and some of them show an image."""

    def __init__(self, count: int = 61):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        return [Text(f"{i} " + "x" * (i * 7 % 11))] + (
            [tiny.Image(tiny.pixels(i), generate=True)] if i % 3 == 0 else []
        )


def stream(source, name: str = "numbers", weight: float = 1.0, seed: int = 3) -> Stream:
    return Stream(name, weight, source, Preparation(SourceConfig(path=name), ImageReader(1)), seed)


def reader(host: int = 0, hosts: int = 1, groups: int = 4, **options) -> GroupedBatches:
    per_host = SHAPE.rows // hosts
    rows = range(host * per_host, (host + 1) * per_host)
    encode = RowEncoder(Encoder(tiny.tokenizer(), tiny.CODEC), SHAPE)
    return GroupedBatches([stream(Numbered())], encode, groups, rows=rows, **options)


def joined(blocks: dict) -> list[np.ndarray]:
    """Global arrays from the groups' blocks."""
    ordered = [jax.tree.leaves(blocks[g]) for g in sorted(blocks)]
    return [np.concatenate(parts) for parts in zip(*ordered, strict=True)]


def read_on(hosts: list[GroupedBatches], count: int) -> list[list[np.ndarray]]:
    return [joined({g: block for host in hosts for g, block in next(host).items()}) for _ in range(count)]


def position(hosts: list[GroupedBatches], monkeypatch) -> dict:
    """What each host would save; in one process, `gather` gets what each of them knows."""
    known = [{str(g): state for g, state in host._states.items()} for host in hosts]
    monkeypatch.setattr(groups_module.processes, "gather", lambda _: known)
    states = [host.get_state() for host in hosts]
    assert all(state == states[0] for state in states)
    return json.loads(json.dumps(states[0]))  # as in a checkpoint


def same(a: list, b: list) -> None:
    for x, y in zip(a, b, strict=True):
        for left, right in zip(x, y, strict=True):
            np.testing.assert_array_equal(left, right)


def test_the_batches_are_the_same_on_any_number_of_hosts():
    whole = read_on([reader()], 5)
    for hosts in (2, 4):
        readers = [reader(h, hosts) for h in range(hosts)]
        assert [len(next(reader(h, hosts))) for h in range(hosts)] == [4 // hosts] * hosts  # each reads its share only
        same(read_on(readers, 5), whole)


@pytest.mark.parametrize("before, after", ((1, 2), (2, 1), (1, 4), (4, 2)))
def test_a_position_moves_between_numbers_of_hosts(before, after, monkeypatch):
    hosts = [reader(h, before) for h in range(before)]
    read_on(hosts, 3)
    saved = position(hosts, monkeypatch)
    wanted = read_on(hosts, 3)
    others = [reader(h, after) for h in range(after)]
    for other in others:
        other.set_state(saved)
    same(read_on(others, 3), wanted)


def test_nothing_is_lost_or_repeated(monkeypatch):
    """Two epochs of 61 documents in 4 groups, stopped twice and gone on with on other numbers of hosts: each document
    as often as it was read. What the packers still hold stays back, so that only the last documents may be missing."""
    seen, saved = Counter(), None
    for hosts in (2, 4, 1):
        readers = [reader(h, hosts) for h in range(hosts)]
        for r in readers:
            if saved:
                r.set_state(saved)
        for tokens, _, segments, *_ in read_on(readers, 3):
            for row, ids in zip(tokens, segments, strict=True):
                for segment in range(1, ids.max() + 1):
                    text = tiny.tokenizer().decode(row[ids == segment])
                    seen[int("".join(c for c in text.split("x")[0].split("<")[0] if c.isdigit()))] += 1
        saved = position(readers, monkeypatch)
    epochs = min(seen.values())
    assert epochs >= 1 and set(seen) == set(range(61))
    assert max(seen.values()) - epochs <= 1


@pytest.mark.parametrize(
    "options", [{"threads": 3}, {"workers": 1}, pytest.param({"workers": 3, "threads": 1}, marks=pytest.mark.slow)]
)
def test_the_batches_do_not_depend_on_who_reads_ahead(options, monkeypatch):
    wanted, ahead = read_on([reader()], 4), reader(**options)
    same(read_on([ahead], 2), wanted[:2])
    saved = position([ahead], monkeypatch)
    ahead.close()
    resumed = reader()  # read ahead or not, a position is the same
    resumed.set_state(saved)
    same(read_on([resumed], 2), wanted[2:])


@pytest.mark.parametrize("mesh", (dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=1, tensor=8)))
def test_placed_on_a_mesh(mesh):
    layout = sharding.batch_sharding(sharding.make_mesh(**mesh))
    assert own_rows(layout, 8) == list(range(8))
    grouped, again = reader(), reader()
    batch = grouped.place(next(grouped), layout)
    for array, wanted in zip(jax.tree.leaves(batch), read_on([again], 1)[0], strict=True):
        assert array.sharding.is_equivalent_to(layout, array.ndim)
        np.testing.assert_array_equal(np.asarray(array), wanted)


def test_groups_that_do_not_fit():
    with pytest.raises(ConfigError, match="must divide the batch's 8 rows"):
        reader(groups=3)
    with pytest.raises(ConfigError, match="set data.groups=4"):
        reader(groups=2).set_state({"format": 2, "groups": [{}] * 4})
    with pytest.raises(ConfigError, match="an older version"):
        reader().set_state({"groups": [{}] * 4})


def test_the_vlm_budget_holds_in_every_group():
    shape = replace(SHAPE, vlm_length=9)
    source = [[Text("a b c"), tiny.Image(tiny.pixels(i), generate=True)] for i in range(4)]
    found = next(GroupedBatches([stream(source)], RowEncoder(Encoder(tiny.tokenizer(), tiny.CODEC), shape), 4))
    words = [np.sum((block.modality != FLOW) & (block.modality != PAD), axis=1) for block in found.values()]
    assert 0 < np.max(words) <= 9 and np.max([np.max(block.segments) for block in found.values()]) == 1
