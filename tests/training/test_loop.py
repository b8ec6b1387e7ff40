"""One story: train, stop, save model and data position, resume, same numbers; and a checkpoint on another mesh."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny_experiment import tiny_config

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.data.documents import Text
from starflow2_jax.data.images import read_image, write_image
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import init_params
from starflow2_jax.parallel.content_hash import content_hash
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.stages import STAGES
from starflow2_jax.training import loop
from starflow2_jax.training.faults import NonFiniteLoss
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.program import abstract_params


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


def params_at(folder, number: int, mesh=None) -> dict:
    trainer = Trainer(tiny_config(mesh=mesh or dict(data=8, fsdp=1, tensor=1)), folder)
    shapes = abstract(abstract_params(trainer.model, "frozen" if number <= 4 else "trainable"), trainer.mesh)
    return trainer.checkpoints.steps.restore(number, {"params": shapes})["params"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Both stages in one go, with a checkpoint in the middle of the second."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Trainer(tiny_config(save_every=6), folder).run(progress=False)
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The same run, stopped in the middle of the second stage and gone on with by a new Trainer."""
    folder = tmp_path_factory.mktemp("resumed")
    for stop_at in (6, None):
        Trainer(tiny_config(), folder).run(progress=False, stop_at=stop_at)
        assert CheckpointDirectory(folder).steps.latest() == (stop_at or 8)
    return folder


def test_parameters_that_no_device_shares_are_named_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train", lambda *arguments: {})
    monkeypatch.setattr(
        loop, "held_whole", lambda config, model, mesh: f"all {mesh.shape['fsdp']} devices hold it whole"
    )
    Trainer(tiny_config(mesh=dict(data=1, fsdp=8, tensor=1)), tmp_path / "run").run(progress=False)
    assert "NOTE: all 8 devices hold it whole" in capsys.readouterr().err


def test_a_stopped_run_goes_on_as_if_undisturbed(undisturbed, resumed):
    """Bit for bit: losses of every step (so the data, too), weights, average, data position."""
    assert [line["step"] for line in lines(undisturbed)] == list(range(1, 9))
    assert [line["stage"] for line in lines(undisturbed)] == ["pretrain"] * 4 + ["joint"] * 4
    assert lines(resumed) == lines(undisturbed)
    assert len({line["loss"] for line in lines(undisturbed)}) == 8
    for number in (6, 8):
        assert content_hash(params_at(undisturbed, number)) == content_hash(params_at(resumed, number))
    mine, theirs = (CheckpointDirectory(f).steps.meta(6) for f in (undisturbed, resumed))
    assert mine.pop("time")["steps"] == theirs.pop("time")["steps"] == 6  # all else of the clock differs
    assert mine == theirs and mine["data"] and mine["stage_step"] == 2
    assert (undisturbed / "frozen.json").read_text() == (resumed / "frozen.json").read_text()


def board(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of all TensorBoard files, read as TFRecords: length (8 bytes), its checksum (4), data,
    checksum.
    """
    found = {}
    for file in sorted((folder / "metrics").glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += length + 16
    return found


def test_tensorboard_shows_what_the_metrics_say(undisturbed):
    wanted = {
        (f"{line['stage']}/{name}", line["step"]): np.float32(value)
        for line in lines(undisturbed)
        for name, value in line.items()
        if name not in ("step", "stage")
    }
    shown = board(undisturbed)
    assert {key: shown.get(key) for key in wanted} == wanted and len({tag for tag, _ in wanted}) > 6
    timings = {tag for tag, _ in shown.keys() - wanted.keys()}  # these are there alone
    assert {"joint/goodput_steps", "joint/input_wait_seconds"} <= timings


def test_a_finished_run_does_nothing_more(resumed):
    before = lines(resumed)
    Trainer(tiny_config(), resumed).run(progress=False)
    assert lines(resumed) == before


@pytest.mark.parametrize(
    "change, saying",
    [
        (dict(joint=9), "stage joint of .* ended after 4 steps.*cannot go on to 9.*; leave stages.joint.steps at 4"),
        (dict(joint=3), "is at step 8 .4 of them in stage joint"),
        (dict(pretrain=5), "is at step 8 .4 of them in stage joint"),
        (dict(order=("joint",)), "is at step 8 .4 of them in stage joint"),
        (dict(order=("pretrain", "text_to_image")), "is at step 8 .4 of them in stage joint"),
    ],
)
def test_stages_that_are_done_stay_as_they_are(resumed, change, saying):
    config, before = tiny_config(), (resumed / "config.json").read_text()
    config.order = change.pop("order", config.order)
    for name, steps in change.items():
        config.stages[name].steps = steps
    with pytest.raises(UserError, match=saying):
        Trainer(config, resumed).run(progress=False)
    assert (resumed / "config.json").read_text() == before and CheckpointDirectory(resumed).steps.latest() == 8


def test_the_second_stage_starts_from_the_pretrained_vlm(undisturbed):
    trainer = Trainer(tiny_config(), undisturbed)
    frozen = trainer.checkpoints.frozen.restore(abstract(abstract_params(trainer.model, "frozen"), trainer.mesh))
    initial = jax.jit(lambda: init_params(trainer.model, jax.random.key(0))["vlm"])()
    moved = np.abs(np.asarray(frozen["vlm"]["lm_head"]["embedding"] - initial["lm_head"]["embedding"])).max()
    assert moved > 1e-4
    assert "vlm" not in params_at(undisturbed, 8)


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh(undisturbed, tmp_path):
    """Saved on data=8; restored on 2 x 2 x 2 with the same bits, and the next steps give the same losses."""
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "steps" / "8")
    mesh = dict(data=2, fsdp=2, tensor=2)
    spread = params_at(folder, 6, mesh)
    up = spread["deep"]["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.mesh.shape == mesh | dict(sequence=1) and up.addressable_shards[0].data.shape == (1, 16, 16)
    assert content_hash(spread) == content_hash(params_at(undisturbed, 6))
    Trainer(tiny_config(mesh=mesh), folder).run(progress=False)
    again, before = lines(folder)[6:], lines(undisturbed)[6:]  # what the copy had of them is dropped
    assert [line["step"] for line in again] == [7, 8]
    for a, b in zip(again, before, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(resumed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(resumed, folder)
    shutil.rmtree(folder / "steps" / "8")
    config = tiny_config(noise=1e38, save_every=1)  # in fp32 the latents become infinite
    with pytest.raises(NonFiniteLoss, match=r"step 7 \(joint\).*last good checkpoint is step 6"):
        Trainer(config, folder).run(progress=False)
    assert CheckpointDirectory(folder).steps.latest() == 6
    assert [line["step"] for line in lines(folder)] == list(range(1, 7))  # and nothing of it was logged


def own_documents(folder: Path, save, size: tuple[int, ...]) -> Path:
    """A JSONL file of ten documents, each one image asked for in words, read once and written once."""
    rng, lines = np.random.default_rng(0), []
    for i in range(10):
        save(folder / f"{i}", rng.uniform(-1, 1, size).astype(np.float32))
        name = next(folder.glob(f"{i}.*")).name
        read = [{"image": name}, {"text": f"which is it? number {i}", "predict": True}]
        lines.append(json.dumps([{"text": f"number {i}"}, {"image": name, "generate": True}] if i % 2 else read))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


@pytest.mark.slow
def test_ones_own_pictures_train_every_stage(tmp_path):
    """Color, not square: codec and tokenizer are fitted to them, and what is sampled has their size."""
    config = tiny_config()
    config.data = dict(source=str(own_documents(tmp_path, write_image, (8, 12, 3))))
    config.codec.image_channels, config.model.grid, config.model.channels = 3, (2, 3), 48
    config.order = ("pretrain", "text_to_image", "image_to_text", "joint")
    config.stages.pretrain.update(patches=160, length=96)
    for name in config.order:
        config.stages[name].steps = 2
    Trainer(config, tmp_path / "run").run(progress=False)
    sampler = Sampler.restore(tmp_path / "run")
    assert sampler.tokenizer.encode("number") != sampler.tokenizer.encode("rebmun")
    assert len(sampler.tokenizer.encode("number")) < len(sampler.tokenizer.encode("rebmun"))
    [document] = sampler.generate([[Text("number 3")]], SampleOptions(max_tokens=7, image_first=True))
    assert document[0].pixels.shape == (8, 12, 3)


@pytest.mark.slow
def test_ones_own_latents(tmp_path):
    def save(path, array):
        np.save(path, array)

    config = tiny_config()
    config.data = dict(source=str(own_documents(tmp_path, save, (2, 2, 16))))
    config.codec = dict(kind="latents", grid=(2, 2), channels=16, shift=0.25, scale=2.0)
    config.order = ("pretrain", "text_to_image")
    config.stages.pretrain.steps, config.stages.text_to_image.steps = 0, 1
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.codec.encode(np.full((1, 2, 2, 16), 2.25))[0, 0, 0, 0] == 1.0
    Trainer(config, tmp_path / "run").run(progress=False)
    sampler = Sampler.restore(tmp_path / "run")
    [document] = sampler.generate([[Text("number 3")]], SampleOptions(max_tokens=5, image_first=True))
    assert document[0].pixels.shape == (2, 2, 16)
    path = write_image(tmp_path / "sample", document[0].pixels, sampler.codec.is_pixels)
    assert np.array_equal(read_image(path, 3), document[0].pixels)


def test_a_model_without_shallow_blocks_trains_and_draws(tmp_path):
    """Then the deep flow's Gaussians are those of the latents themselves."""
    config = tiny_config()
    config.model.shallow_blocks = 0
    Trainer(config, tmp_path).run(progress=False)
    sampler = Sampler.restore(tmp_path)
    assert "shallow" not in sampler.params and np.isfinite(lines(tmp_path)[-1]["image_loss"])
    [document] = sampler.generate([[Text("draw a six")]], SampleOptions(max_tokens=5, image_first=True))
    assert document[0].pixels.shape == (8, 8, 1)
    with pytest.raises(KeyError, match="deepest"):  # no other group may be missing
        replace(STAGES["joint"], trains=("shallow", "deepest")).trained(sampler.params)
    latents = np.random.default_rng(0).standard_normal((2, 4, 16)).astype(np.float32)
    variables = {"params": sampler.params}
    states, logdet = sampler.model.apply(variables, latents[None], method="trace")
    assert np.array_equal(states[-1][0], latents) and logdet.shape == (1, 2, 4, 16) and not logdet.any()
    assert np.array_equal(sampler.model.apply(variables, latents, method="decode"), latents)


@pytest.mark.parametrize("change, saying", (("size", "one size"), ("patch", "does not divide"), ("kind", "'patches'")))
def test_a_codec_that_does_not_fit_ones_own_pictures(tmp_path, change, saying):
    config = tiny_config()
    path = str(own_documents(tmp_path, write_image, (8, 12, 3)))
    config.data = dict(sources=dict(mine=dict(path=path, crop="none")))
    for stage in config.stages.values():
        stage.mix = {}
    config.codec.image_channels = 3
    if change == "size":
        write_image(tmp_path / "3", np.zeros((4, 4, 3)))
        config.model.channels = 48
    elif change == "patch":
        config.codec.patch, config.model.channels = 5, 75
    else:
        config.codec.kind = "patches"
    with pytest.raises(UserError, match=saying):
        Trainer(config, tmp_path / "run")
