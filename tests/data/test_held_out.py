"""Held-out documents: each once, in a fixed order, without random draws, the same on 1, 2 and 4 hosts."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax.config import loading as configs
from starflow2_jax.data import sources
from starflow2_jax.data.documents import Text
from starflow2_jax.data.groups import GroupedBatches
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.mixture import Stream
from starflow2_jax.data.pipeline import Encoder, RowEncoder
from starflow2_jax.data.preparation import Preparation, SourceConfig, unvaried
from starflow2_jax.errors import ConfigError
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES

SHAPE, COUNT = Shape(8, 24, 1), 61
QUICK = "digits_quick"


class Numbered:
    """Document i says i, some are too long for a row, and some show an image."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int):
        text = Text(f"{i} " + "word " * (40 if i % 20 == 7 else i % 3), predict=True)
        return [text] + ([tiny.Image(tiny.pixels(i), generate=True)] if i % 3 == 0 else [])


def reader(host: int = 0, hosts: int = 1) -> GroupedBatches:
    prepare = Preparation(SourceConfig(path="numbered"), ImageReader(1))
    stream = Stream("numbered", 1.0, Numbered(), prepare, seed=5, once=True)
    per_host = SHAPE.rows // hosts
    rows = range(host * per_host, (host + 1) * per_host)
    encode = RowEncoder(Encoder(tiny.tokenizer(), tiny.CODEC), SHAPE)
    return GroupedBatches([stream], encode, 4, rows=rows)


def batches(hosts: int) -> list[list[np.ndarray]]:
    """Whole batches until all hosts have ended."""
    readers, found = [reader(host, hosts) for host in range(hosts)], []
    while True:
        blocks = {group: rows for each in readers for group, rows in next(each).items()}
        if all(each.ended for each in readers):
            return found
        parts = [jax.tree.leaves(blocks[group]) for group in sorted(blocks)]
        found.append([np.concatenate(leaves) for leaves in zip(*parts, strict=True)])


def numbers(found: list[list[np.ndarray]]) -> list[int]:
    """The numbers that the documents of batches say, in their order."""
    said = []
    for tokens, _, segments, *_ in found:
        for row, ids in zip(tokens, segments, strict=True):
            texts = (tiny.tokenizer().decode(row[ids == k]) for k in range(1, ids.max() + 1))
            said += [int("".join(c for c in text.split("word")[0].split("<")[0] if c.isdigit())) for text in texts]
    return said


def test_each_document_once_on_any_number_of_hosts(capsys):
    whole = batches(1)
    assert sorted(numbers(whole)) == [i for i in range(COUNT) if i % 20 != 7]
    assert numbers(whole) != sorted(numbers(whole))  # the file's order may be by class
    for hosts in (2, 4):
        for a, b in zip(batches(hosts), whole, strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)
    assert "needs" in capsys.readouterr().err


def test_reading_begins_again():
    again = reader()
    first = [next(again) for _ in range(2)]
    again.restart()
    for a, b in zip(first, (next(again) for _ in range(2)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_nothing_is_drawn_at_random():
    varied = SourceConfig(path="x", crop="random", flip=True)
    assert unvaried(varied) == SourceConfig(path="x") and unvaried(replace(varied, crop="none")).crop == "none"
    config = configs.load(QUICK)
    stream = sources.held_out_streams(config, config.evals.val.mix, STAGES["joint"], tiny.CODEC, None)[0]
    assert not stream.prepare.drops and stream.once
    other = configs.load(QUICK, ["seed=7"])
    again = sources.held_out_streams(other, other.evals.val.mix, STAGES["joint"], tiny.CODEC, None)[0]
    assert again.seed == stream.seed  # runs of any seed are compared by the same documents


def test_nothing_is_trained_on_them_or_fitted_to_them():
    config = configs.load(QUICK).unlock()
    kinds = ["caption", "count", "mirror", "read", "sum"]
    assert [each.name for each in sources.named(config)] == kinds
    config.stages.joint.mix = {}  # all sources alike
    assert [each.name for each in sources.named(config, "joint")] == kinds
    config.stages.joint.mix = dict(read_held_out=1.0)  # a stage may read them all the same
    assert [each.name for each in sources.named(config, "joint")] == ["read_held_out"]


@pytest.mark.parametrize(
    "overrides, saying",
    [
        (["evals.val.mix.rea=1"], "evals.val.mix names the source 'rea'; data.sources has"),
        (["evals.val.evry=1"], "did you mean 'evals.val.every'"),
        (["evals.val.kind=los"], "evals.val.kind must be one of loss, sheet, reconstruction, probe, not 'los'"),
        (["evals.val.prompts=a"], "there is no config key 'evals.val.prompts'"),
        (["evals.val.every=-1"], "at least 0"),
        (["evals.val.stages=joins"], "did you mean 'joint'"),
        (["evals.sheet.every=5"], r"evals.sheet \(SheetOptions\) lacks prompts"),
        (["evals.a b.mix.read=1"], "an evaluation's name has letters"),
        ([f"evals.val.mix.{kind}_held_out=0" for kind in ("caption", "read", "sum", "mirror", "count")], "no source"),
        (
            ["evals.sheet.prompts=a", "codec.kind=latents", "codec.grid=4,4", "codec.channels=4"],
            "evals.sheet draws pictures, but the codec 'latents' makes none",
        ),
    ],
)
def test_mistakes_are_refused_when_the_config_is_loaded(overrides, saying):
    with pytest.raises(ConfigError, match=saying):
        configs.load(QUICK, overrides)


def test_every_source_held_out_is_refused():
    config = configs.load(QUICK).to_dict()
    config["data"]["sources"] = {"read": config["data"]["sources"]["read"]}
    config["evals"] = {"val": {"mix": {"read": 1.0}}}
    for stage in config["stages"].values():
        stage["mix"] = {}
    with pytest.raises(ConfigError, match="every source is held out"):
        configs.complete(config)


def test_an_evaluation_is_of_the_kind_that_its_name_says():
    config = configs.load(
        QUICK, ["evals.sheet.prompts=draw a seven,a nine", "evals.val.every=7", "evals.*.stages=joint"]
    )
    assert config.evals.sheet.kind == "sheet" and config.evals.sheet.prompts == ("draw a seven", "a nine")
    assert config.evals.val.kind == "loss" and config.evals.val.every == 7
    values = config.to_dict()
    values["evals"]["sheet"]["prompts"] = "one.jsonl"
    del values["evals"]["sheet"]["kind"]
    assert configs.complete(values).evals.sheet.prompts == ("one.jsonl",)
