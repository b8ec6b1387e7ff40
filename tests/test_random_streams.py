"""Random streams depend on the run's seed and on names, and on nothing else."""

import jax
import numpy as np
import pytest
from tiny_experiment import tiny_config

from starflow2_jax.data import sources
from starflow2_jax.data.documents import Image
from starflow2_jax.data.mixture import order
from starflow2_jax.random_streams import stream_key, stream_seed
from starflow2_jax.stages import STAGES, Stage
from starflow2_jax.training.loop import Trainer


def test_other_names_or_seeds_give_other_streams():
    streams = [
        (0, "stage", "joint"), (1, "stage", "joint"), (0, "documents", "joint"), (0, "stage", "pretrain"), (0, "joint"),
        (0, "joint", "stage"), (0, "stage/joint"), (0, "stagejoint"), (0,), (0, ""), (0, "", ""), (0, "a\x00b"), (0, "a", "b"),
    ]  # fmt: skip
    assert len({stream_seed(*stream) for stream in streams}) == len(streams)
    assert len({jax.random.key_data(stream_key(*stream)).tobytes() for stream in streams}) == len(streams)
    draws = [float(jax.random.normal(stream_key(*stream))) for stream in streams]
    assert len(set(draws)) == len(draws)


def test_a_stream_is_the_same_in_every_process():
    """Python's own hash of a text differs from process to process; this number is written down."""
    assert stream_seed(0, "stage", "joint") == 2218597503


def drawn(folder, name: str) -> tuple:
    """The key of a stage's training and the first documents that it reads."""
    config = tiny_config()
    streams = sources.streams(config, STAGES[name], sources.make_codec(config), None)
    parts = [part for stream in streams for i in range(5) for part in stream.source[order(stream)[i]]]
    said = [part.pixels.tobytes() if isinstance(part, Image) else part.text for part in parts]
    state = Trainer(config, folder).task(name).new_state(None)
    return np.asarray(jax.random.key_data(state.key)).tobytes(), *said


@pytest.mark.parametrize("name", ["joint", "image_to_text"])
def test_a_new_row_of_the_table_changes_no_other_stage(tmp_path, monkeypatch, name):
    before = drawn(tmp_path / "run", name)
    rows = dict(STAGES)
    for row in rows:
        monkeypatch.delitem(STAGES, row)
    monkeypatch.setitem(STAGES, "edits", Stage("edits", ("adapter",), True, True, True, True))
    for row, stage in rows.items():
        monkeypatch.setitem(STAGES, row, stage)
    assert list(STAGES)[0] == "edits" and drawn(tmp_path / "run", name) == before


def test_two_stages_draw_differently(tmp_path):
    key, *documents = drawn(tmp_path / "run", "joint")
    other_key, *other_documents = drawn(tmp_path / "run", "image_to_text")
    assert key != other_key and documents != other_documents
