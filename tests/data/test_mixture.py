"""Sources that are shuffled and mixed, positions that survive a change of the mixture, and documents that are
skipped.
"""

import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax.data.documents import DocumentError, Draft, ImageError, Text
from starflow2_jax.data.faults import DataFaultsConfig, DataFaultsError
from starflow2_jax.data.groups import GroupedBatches
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.mixture import Stream, order
from starflow2_jax.data.pipeline import Encoder, RowEncoder
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.sequence import Shape

SHAPE = Shape(4, 24, 1)


class Letters:
    """Document i of `count` says LETTER i; those in `broken` cannot be read."""

    def __init__(self, letter: str, count: int = 40, broken=()):
        self.letter, self.count, self.broken = letter, count, set(broken)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Draft:
        if i in self.broken:
            raise (ImageError if i % 2 else DocumentError)(f"{self.letter} {i} is broken")
        return [Text(f"{self.letter} {i}", predict=True)]


def stream(source, weight: float = 1.0) -> Stream:
    config = SourceConfig(path=source.letter)
    return Stream(
        source.letter, weight, source, Preparation(config, ImageReader(1)), stream_seed(0, "documents", source.letter)
    )


def reader(*streams: Stream, groups: int = 1, rows=None, **faults) -> GroupedBatches:
    encode = RowEncoder(Encoder(tiny.tokenizer(), tiny.CODEC), SHAPE)
    return GroupedBatches(streams, encode, groups, faults=DataFaultsConfig(**faults), rows=rows)


def told(data: GroupedBatches, count: int) -> list[tuple[str, int]]:
    """The documents of the next `count` batches."""
    found = []
    for _ in range(count):
        for block in next(data).values():
            for row, ids in zip(block.tokens, block.segments, strict=True):
                for segment in range(1, ids.max() + 1):
                    letter, number = tiny.tokenizer().decode(row[ids == segment]).split("<")[0].split()
                    found.append((letter, int(number)))
    return found


@pytest.mark.parametrize("count", [1, 2, 61])
def test_every_epoch_is_a_permutation_and_no_two_are_alike(count):
    indices = order(stream(Letters("a", count)))
    epochs = [[indices[epoch * count + i] for i in range(count)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == (1 if count == 1 else 2 if count == 2 else 6)
    other = order(stream(Letters("b", count)))
    assert count < 61 or [other[i] for i in range(count)] != epochs[0]


def test_the_shares_are_those_of_the_weights():
    weights = {"a": 0.6, "b": 0.1, "c": 0.3}
    data = reader(*(stream(Letters(letter, 1000), weight) for letter, weight in weights.items()))
    seen = Counter(letter for letter, _ in told(data, 150))
    total = sum(seen.values())
    assert total > 1500
    for letter, weight in weights.items():
        assert abs(seen[letter] / total - weight) < 0.01 * weight + 1 / total
    read = data.check()
    assert all(read[letter] >= seen[letter] for letter in weights)  # the packer has begun the next batch


def saved(data: GroupedBatches) -> dict:
    return json.loads(json.dumps(data.get_state()))


def test_a_mixture_that_changes_at_a_resume_keeps_each_sources_position():
    """No document of a source comes twice before all of it were seen, though weights and sources change twice."""
    a, b, c = (Letters(letter, 300) for letter in "abc")
    data, seen = reader(stream(a, 0.5), stream(b, 0.5)), Counter()
    mixtures = [
        [stream(a, 0.2), stream(b, 0.4), stream(c, 0.4)],
        [stream(c, 0.9), stream(a, 0.1)],
        [stream(b), stream(a)],
    ]
    for mixture in [*mixtures, None]:
        seen.update(told(data, 4))
        state = saved(data)
        if mixture:
            data = reader(*mixture)
            data.set_state(state)
    assert all(sum(count for (letter, _), count in seen.items() if letter == x) > 20 for x in "ac")
    assert set(seen.values()) == {1}
    assert 80 < len(seen) < 900


def test_positions_are_the_same_after_any_number_of_batches():
    def mixture():
        return reader(stream(Letters("a"), 0.3), stream(Letters("b", broken=range(5)), 0.7), groups=2, most=1.0)

    whole = [jax.tree.leaves(block) for data in [mixture()] for _ in range(8) for block in next(data).values()]
    for batches in range(6):
        data = mixture()
        told(data, batches)
        counts, state = data.check(), saved(data)
        resumed = mixture()
        if batches:
            resumed.set_state(state)
        ahead = [jax.tree.leaves(block) for _ in range(2) for block in next(resumed).values()]
        for one, other in zip(ahead, whole[2 * batches :], strict=False):
            assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
        told(data, 2)
        assert data.check() == resumed.check() and (data.check() != counts or not batches)


@pytest.mark.parametrize("hosts", [2, 4])
def test_mixtures_and_faults_are_the_same_on_any_number_of_hosts(hosts, monkeypatch):
    """Also after a resume with another mixture: one host saves, several go on."""
    a, b, c = Letters("a", broken=range(4)), Letters("b", 90, broken={7}), Letters("c")
    before, after = [stream(a, 0.3), stream(b, 0.7)], [stream(b, 0.2), stream(c, 0.8)]
    one = reader(*before, groups=4, most=1.0)
    told(one, 3)
    state = saved(one)

    def resumed(rows=None) -> GroupedBatches:
        data = reader(*after, groups=4, rows=rows, most=1.0)
        data.set_state(state)
        return data

    alone, per_host = resumed(), 4 // hosts
    several = [resumed(range(h * per_host, (h + 1) * per_host)) for h in range(hosts)]
    for _ in range(3):
        wanted = next(alone)
        found = {group: block for host in several for group, block in next(host).items()}
        assert set(found) == set(wanted)
        for group, block in found.items():
            for x, y in zip(jax.tree.leaves(block), jax.tree.leaves(wanted[group]), strict=True):
                np.testing.assert_array_equal(x, y)
    counts, reports = alone.check(), []
    monkeypatch.setattr("starflow2_jax.data.groups.processes.gather", lambda own: reports.append(own) or [own])
    for host in several:
        host.check()
    monkeypatch.setattr(
        "starflow2_jax.data.groups.processes.gather", lambda own: json.loads(json.dumps(reports[:hosts]))
    )
    assert all(host.check() == counts for host in several) and counts["c"] > 20
    assert sum(count for name, count in counts.items() if "/" in name) > 0


def test_documents_that_cannot_be_used_are_skipped_counted_and_said_once(capsys):
    long = Letters("long", 10)
    long.letter = "x " * 40
    data = reader(
        stream(Letters("a", broken={3, 4, 5})), Stream("long", 0.2, long, stream(Letters("b")).prepare, 1), most=1
    )
    seen = Counter(told(data, 40))
    assert not {("a", i) for i in (3, 4, 5)} & set(seen) and len(seen) == 37
    counts = data.check()
    assert (
        counts["long/length"] == counts["long"] > 0
        and abs(counts["a/image"] - 2 * counts["a/document"]) <= 4
        and counts["a/document"] > 10
    )
    assert 0.06 < (counts["a/image"] + counts["a/document"]) / counts["a"] < 0.09
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 3
    assert (
        sum("of the source 'a' is skipped: a 3 is broken" in w or "skipped: a 5 is broken" in w for w in warnings) == 1
    )
    assert sum("of the source 'long' is skipped: a document needs" in w for w in warnings) == 1


def test_too_many_of_them_end_the_run():
    def data(**faults):
        return reader(stream(Letters("a", broken={3, 4, 5})), stream(Letters("b")), **faults)

    patient = data(most=0.1)
    told(patient, 20)
    assert patient.check()["a/image"] > 3
    strict = data(strict=True)
    with pytest.raises(
        DataFaultsError, match=r"\d of \d+ documents of the source 'a' cannot be used \(data.faults.strict"
    ):
        for _ in range(20):
            told(strict, 1)
            strict.check()
    mean = data(most=0.05)
    with pytest.raises(
        DataFaultsError, match=r"source 'a' cannot be used \(data.faults.most=0.05\); the first one: .*broken"
    ):
        for _ in range(40):
            told(mean, 1)
            mean.check()
    assert mean.get_state()["groups"][0] is not None


@pytest.mark.parametrize("host", [0, 1])
def test_the_other_hosts_end_with_the_same_sentence(host, monkeypatch):
    """Group 0 is broken, group 1 is not: a host that reads nothing wrong ends, too."""
    everything = Letters("a", 40, broken=range(40))
    hosts = [
        reader(stream(everything if h == 0 else Letters("a")), groups=2, rows=range(2 * h, 2 * h + 2)) for h in (0, 1)
    ]
    for each in hosts:
        next(each)
    reports = []
    monkeypatch.setattr("starflow2_jax.data.groups.processes.gather", lambda own: reports.append(own) or [own])
    for each in hosts:
        try:
            each.check()
        except DataFaultsError:
            pass
    monkeypatch.setattr("starflow2_jax.data.groups.processes.gather", lambda own: json.loads(json.dumps(reports)))
    with pytest.raises(DataFaultsError, match="1000 of 10.. documents of the source 'a' cannot be used"):
        hosts[host].check()


def test_a_source_without_any_good_document_gives_empty_rows_and_no_hang():
    data = reader(stream(Letters("a", 7, broken=range(7))))
    [block] = next(data).values()
    assert block.segments.shape == (4, 24) and not block.segments.any() and not block.text_weight.any()
    good = jax.tree.map(np.shape, next(iter(next(reader(stream(Letters("a")))).values())))
    assert jax.tree.map(np.shape, block) == good
    with pytest.raises(DataFaultsError, match="1000 of 1000 documents of the source 'a'"):
        data.check()


def test_a_file_that_vanishes_while_it_is_read(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps([{"text": f"a {i}", "predict": True}]) for i in range(50)))
    source = JsonlDocuments(str(path))
    config = SourceConfig(path=str(path))
    data = reader(Stream("file", 1.0, source, Preparation(config, ImageReader(1)), 0))
    assert len(told(data, 3)) > 10 and data.check()["file"] > 10
    path.unlink()
    with pytest.raises(DataFaultsError, match="data.jsonl cannot be read"):
        for _ in range(20):
            next(data)
            data.check()
