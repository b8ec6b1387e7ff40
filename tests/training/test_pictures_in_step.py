"""Pictures that the step encodes: the same latents and losses as from shards, on one device and on eight."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import tiny_fae
from PIL import Image as Pillow
from tiny_experiment import tiny_config

from starflow2_jax import cli
from starflow2_jax.checkpoints.codec import write_codec
from starflow2_jax.codecs.fingerprint import fingerprint
from starflow2_jax.errors import ConfigError
from starflow2_jax.parallel import sharding
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.step import encoded

COUNT = 24
PICTURES, LATENTS = "pictures.jsonl", "latents"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec, pictures with captions, and the same as latents: codec/, pictures.jsonl, latents/."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "codec").mkdir()
    write_codec(folder / "codec", tiny_fae.codec())
    levels = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
    lines = []
    for i, picture in enumerate(levels):
        Pillow.fromarray(picture).save(folder / f"{i}.png")
        parts = [{"text": f"zebra {i}", "predict": True}, {"image": f"{i}.png", "generate": True}]
        lines.append(json.dumps(parts))
    (folder / "pictures.jsonl").write_text("\n".join(lines))
    source = ["--source", f"json:{folder}/pictures.jsonl", "--out", str(folder / "latents")]
    assert cli.main(["encode", *source, "--codec", str(folder / "codec"), "--shards", "2"]) == 0
    return folder


def config(folder, **sources: str):
    """An experiment on the sources of these names."""
    c = tiny_config(order=("pretrain", "text_to_image"))
    c.codec = dict(kind="fae", path=str(folder / "codec"), **tiny_fae.OPTIONS)
    c.model.grid, c.model.channels = tiny_fae.GRID, tiny_fae.CHANNELS
    c.data.source, c.data.sources = None, {name: dict(path=str(folder / file)) for name, file in sources.items()}
    for stage in c.stages.values():
        stage.mix, stage.images, stage.length, stage.rows = {}, 4, 96, 16
    c.stages.pretrain.patches = 256
    return c


def losses(folder, after: int) -> np.ndarray:
    lines = map(json.loads, (folder / "metrics" / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if line["step"] > after])


@pytest.mark.slow
def test_training_on_pictures_equals_training_on_their_latents(folder, tmp_path):
    live, stored, parts = tmp_path / "live", tmp_path / "stored", tmp_path / "parts"
    whole = config(folder, a=PICTURES)
    Trainer(whole, live).run(progress=False, stop_at=4)  # the VLM
    for copy in (stored, parts):
        shutil.copytree(live, copy)
    Trainer(whole, live).run(progress=False)
    Trainer(config(folder, a=LATENTS), stored).run(progress=False)
    whole.mesh = dict(data=2, fsdp=4, tensor=1)
    whole.stages.text_to_image.accumulate = 2
    Trainer(whole, parts).run(progress=False)
    wanted = losses(live, 4)
    assert len(wanted) == 4 and len(set(wanted)) == 4
    np.testing.assert_allclose(losses(parts, 4), wanted, rtol=1e-4)
    np.testing.assert_allclose(losses(stored, 4), wanted, rtol=1e-3)  # they are bfloat16


def test_the_step_gives_the_latents_of_the_codec(folder, tmp_path):
    trainer = Trainer(config(folder, a=PICTURES, b=LATENTS), tmp_path / "run")
    task = trainer.task("text_to_image")
    batches = task.batches()
    batch = batches.place(next(batches), sharding.batch_sharding(trainer.mesh))
    batches.close()
    waiting = np.asarray(batch.pictures.waiting)
    there = np.asarray(batch.image_weight) > 0
    assert 0 < waiting.sum() < there.sum()  # both kinds of sources
    assert task.pictures and batch.pictures.pixels.dtype == np.uint8

    frozen = {"codec": jax.device_put(task.codec.encoder_weights())}
    got = jax.jit(partial(encoded, task.codec, parts=2))(frozen, batch)
    assert got.pictures is None
    latents, levels = np.asarray(got.latents), np.asarray(batch.pictures.pixels)
    direct = np.asarray(task.codec.encode(levels[waiting] / np.float32(127.5) - 1))
    np.testing.assert_allclose(latents[waiting], direct.reshape(-1, 16, 4), atol=1e-4)
    np.testing.assert_array_equal(latents[~waiting], np.asarray(batch.latents)[~waiting])
    assert np.ptp(latents[there & ~waiting]) > 1  # those from the shards


def test_latents_alone_need_no_codec_in_the_step(folder, tmp_path):
    task = Trainer(config(folder, a=LATENTS), tmp_path / "run").task("pretrain")
    batches = task.batches()
    assert not task.pictures and next(iter(next(batches).values())).pictures is None
    assert not task.row_encoder(task.streams()).encoder.codec.weights  # they would be copied into each reading process
    batches.close()


def test_a_picture_of_another_size_is_refused(folder):
    codec = replace(tiny_fae.codec(), grid=(2, 2))
    with pytest.raises(ValueError, match="takes 16x16x3"):
        codec.encode(tiny_fae.pictures(1))


def test_latents_of_another_codec_are_refused(folder, tmp_path):
    """When a run is made, by its config, and when it goes on, by its own codec."""
    c = config(folder, a=LATENTS)
    (tmp_path / "other").mkdir()
    write_codec(tmp_path / "other", tiny_fae.codec(1))
    c.codec.path = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds latents of another codec than that of codec.path"):
        Trainer(c, tmp_path / "run")
    c.codec.path = ""  # the codec of the shards
    assert fingerprint(Trainer(c, tmp_path / "run").codec) == fingerprint(tiny_fae.codec())

    trainer = Trainer(config(folder, a=PICTURES), tmp_path / "run")
    trainer.run(progress=False, stop_at=0)
    write_codec(tmp_path / "run", tiny_fae.codec(1))
    with pytest.raises(ConfigError, match="holds latents of another codec than this run's"):
        Trainer(config(folder, a=LATENTS), tmp_path / "run").task("pretrain").batches()
