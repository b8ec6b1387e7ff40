"""Evaluations while training: what they measure, when they run, and what they leave as it is."""

import io
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import evals_experiment
import jax
import numpy as np
import pytest
from PIL import Image as Pillow
from tensorboardX.proto.event_pb2 import Event

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.config.evals import EVAL_OPTIONS
from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.images import ImageReader, as_pillow
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.pipeline import collate
from starflow2_jax.errors import UserError
from starflow2_jax.extensions import import_file
from starflow2_jax.models.pretzel import Pretzel, apply
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.scoring import score
from starflow2_jax.sequence import Shape
from starflow2_jax.training.evals.held_out import HeldOutLosses
from starflow2_jax.training.evals.protocol import Findings
from starflow2_jax.training.evals.sheet import LINE
from starflow2_jax.training.evals.table import EVALS
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.preemption import Preempted, Preemption

ROOT = Path(__file__).parents[2]
QUANTITIES = ("loss", "image_nats", "image_bits", "text_nats")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics/metrics.jsonl").read_text().splitlines()]


def of_evals(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "loss" not in line]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> str:
    return evals_experiment.write(tmp_path_factory.mktemp("held_out"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, held_out) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    Trainer(evals_experiment.config(held_out), folder).run(progress=False)
    return folder


def test_they_run_at_their_interval_and_at_the_end_of_each_stage(trained):
    found = of_evals(trained)
    assert [(line["step"], line["stage"]) for line in found] == [
        (2, "pretrain"), (4, "pretrain"), (6, "joint"), (8, "joint"), (9, "joint"),
    ]  # fmt: skip
    assert sorted(path.name for path in (trained / "evals/sheet").iterdir()) == ["00000008.png", "00000009.png"]
    wanted = {
        f"val/{ema}{name}{source}" for ema in ("", "ema_") for name in QUANTITIES for source in ("", "/mine", "/other")
    }
    assert set(found[-1]) == {"step", "stage"} | wanted
    assert not any("image" in name for name in found[0])  # the VLM's own training has no loss of images
    assert found[-1]["val/loss"] != found[-1]["val/ema_loss"]
    summary = json.loads((trained / "metrics/summary.json").read_text())
    assert summary["share"]["evals"] > 0 and sum(summary["share"].values()) == pytest.approx(1)


def read(held_out: str) -> list[Document]:
    return [JsonlDocuments(held_out).read(i, ImageReader(1, (8, 8))) for i in range(evals_experiment.COUNT)]


def text_nats(sampler: Sampler, document: Document) -> tuple[float, float]:
    """The summed -log p of the tokens that count, and their number, by a softmax over whole logits in float64."""
    features = sampler.encoder(document)
    batch = collate([features], Shape(1, len(features["tokens"]), 5))
    output = sampler.run(lambda: apply(sampler.model, sampler.params, batch, skips=True))
    head = np.asarray(apply(sampler.model, sampler.params, method=Pretzel.text_head), np.float64)
    logits = np.asarray(output.text, np.float64)[0, :-1] @ head.T
    logp = (
        logits
        - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    weights, targets = features["text_weight"][1:], features["tokens"][1:]
    return float(-np.sum(weights * logp[np.arange(len(targets)), targets])), float(weights.sum())


@pytest.mark.slow
def test_the_losses_are_the_exact_likelihoods_of_the_documents(trained, held_out):
    """Of all documents of the file, once each, as the sampler scores them one by one with the average that the stage
    left.
    """
    sampler, found = Sampler.restore(trained), of_evals(trained)[-1]
    images = [part for parts in score(sampler, read(held_out)) for part in parts if part.dims]
    nats = -sum(part.nats for part in images) / sum(part.dims for part in images)
    np.testing.assert_allclose(found["val/ema_image_nats/mine"], nats, rtol=1e-5)
    np.testing.assert_allclose(found["val/ema_image_bits/mine"], (nats + np.log(128)) / np.log(2), rtol=1e-5)
    words = [text_nats(sampler, document) for document in read(held_out)]
    own = sum(total for total, _ in words) / sum(count for _, count in words)
    np.testing.assert_allclose(found["val/ema_text_nats/mine"], own, rtol=1e-5)
    loss = nats + sampler.codec.log_volume - 0.5 * np.log(2 * np.pi) + own
    np.testing.assert_allclose(found["val/ema_loss/mine"], loss, rtol=1e-5)


def measured(trained: Path, config) -> dict[str, float]:
    """The held-out losses of step 6, measured anew."""
    trainer = Trainer(config, trained)
    task = trainer.task("joint")
    with jax.set_mesh(trainer.mesh):
        wanted = task.abstract_state()
        groups = trainer.checkpoints.steps.restore(6, {"params": wanted.params, "ema": wanted.ema})
        evaluate = HeldOutLosses("val", config.evals.val, task, trained)
        first, again = (
            evaluate(6, wanted.replace(**groups), task.frozen(trainer.checkpoints)).numbers for _ in range(2)
        )
    assert first == again
    return {f"val/{name}": value for name, value in first.items()}


@pytest.mark.parametrize(
    "mesh", (dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, sequence=2)), ids=str
)
def test_they_are_the_same_on_any_mesh(trained, held_out, mesh):
    logged = next(line for line in of_evals(trained) if line["step"] == 6)
    found = measured(trained, evals_experiment.config(held_out, mesh=mesh))
    for name, value in found.items():
        np.testing.assert_allclose(logged[name], value, rtol=2e-5, err_msg=name)
    assert set(found) == logged.keys() - {"step", "stage"}


def test_the_noise_is_the_same_every_time_and_counts(trained, held_out):
    plain = measured(trained, evals_experiment.config(held_out))
    noisy = measured(trained, evals_experiment.config(held_out, noise=0.1))
    parts = evals_experiment.config(held_out, noise=0.1)
    parts.stages.joint.accumulate, parts.mesh = 2, dict(data=4, fsdp=1, tensor=2)
    assert noisy["val/image_nats"] != plain["val/image_nats"] and noisy["val/text_nats"] != plain["val/text_nats"]
    for name, value in measured(trained, parts).items():  # in micro-batches
        np.testing.assert_allclose(noisy[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.slow
def test_training_is_the_same_without_them(trained, held_out, tmp_path):
    config = evals_experiment.config(held_out, evals={})
    for name in ("mine", "other"):
        del config.data.sources[name]
    Trainer(config, tmp_path / "run").run(progress=False)
    assert lines(tmp_path / "run") == [line for line in lines(trained) if "loss" in line]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_evaluates_logs_the_same(trained, held_out, tmp_path, monkeypatch):
    evaluate = HeldOutLosses.__call__

    def fail(self, number, *rest):
        if number == 8:
            raise KeyboardInterrupt
        return evaluate(self, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(HeldOutLosses, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            Trainer(evals_experiment.config(held_out), tmp_path / "run").run(progress=False)
    assert CheckpointDirectory(tmp_path / "run").steps.latest() == 6
    with monkeypatch.context() as patched:  # told to end after step 8, it saves at once and evaluates later
        patched.setattr(Preemption, "reached", lambda self, step: step == 8)
        with pytest.raises(Preempted):
            Trainer(evals_experiment.config(held_out), tmp_path / "run").run(progress=False)
    assert [line["step"] for line in of_evals(tmp_path / "run")] == [2, 4, 6]
    Trainer(evals_experiment.config(held_out), tmp_path / "run").run(progress=False)
    assert lines(tmp_path / "run") == lines(trained)
    for sheet in (trained / "evals/sheet").iterdir():
        assert (tmp_path / "run/evals/sheet" / sheet.name).read_bytes() == sheet.read_bytes()


@pytest.mark.parametrize("metric, kept", (("", [3, 5]), ("val/loss", [2, 5]), ("grad_norm", None)))
def test_keep_best_ranks_by_a_metric(held_out, tmp_path, monkeypatch, metric, kept):
    numbers = dict(ema_loss=[9.0, 3.0, 2.0, 5.0, 4.0], loss=[9.0, 1.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(
        HeldOutLosses, "__call__", lambda self, n, *_: Findings({k: v[n - 1] for k, v in numbers.items()})
    )
    config = evals_experiment.config(held_out, save_every=1, keep=1, keep_best=1, best_metric=metric)
    del config.evals["sheet"]
    config.evals["val"]["every"], config.stages.pretrain.steps = 1, 0
    Trainer(config, tmp_path / "run").run(progress=False)
    if kept is None:
        norms = {line["step"]: line["grad_norm"] for line in lines(tmp_path / "run") if "grad_norm" in line}
        kept = sorted({min(norms, key=norms.get), 5})
    assert CheckpointDirectory(tmp_path / "run").steps.on_disk() == kept


def test_a_metric_that_nothing_logs_is_warned_about(held_out, tmp_path, capsys):
    config = evals_experiment.config(held_out, evals={}, save_every=1, keep_best=1, best_metric="val/los")
    config.order = ("pretrain",)
    Trainer(config, tmp_path / "run").run(progress=False)
    assert capsys.readouterr().err.count("no 'val/los' was measured") == 1


def test_the_sheet_shows_what_the_sampler_draws(trained, held_out):
    sampler = Sampler.restore(trained)
    options = SampleOptions(image_temperature=0.9, guidance=1.0, max_tokens=5, image_first=True)
    prompts = [[Text("draw a seven")], *read(held_out)]
    answers = sampler.generate(prompts, options, [0, 1] * len(prompts), 2)
    sheet = np.asarray(Pillow.open(trained / "evals/sheet/00000009.png"), int)[..., 0]
    assert sheet.shape == (LINE + len(prompts) * (64 + 2 * LINE), LINE + 2 * (64 + LINE))
    for i, answer in enumerate(answers):
        row, column = divmod(i, 2)
        top, left = LINE + row * (64 + 2 * LINE) + LINE, LINE + column * (64 + LINE)
        [pixels] = [part.pixels for part in answer if isinstance(part, Image)]
        wanted = np.kron(np.asarray(as_pillow(pixels), int), np.ones((8, 8), int))
        assert np.abs(sheet[top : top + 64, left : left + 64] - wanted).max() <= 1


def test_tensorboard_shows_numbers_and_sheets(trained):
    found = {}
    for file in sorted((trained / "metrics").glob("events.*")):  # length (8 bytes), its checksum (4), data, checksum
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value for value in event.summary.value}
            at += length + 16
    logged = of_evals(trained)[-1]
    assert found["joint/val/ema_loss/mine", 9].simple_value == np.float32(logged["val/ema_loss/mine"])
    shown = Pillow.open(io.BytesIO(found["joint/sheet/samples", 8].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(Pillow.open(trained / "evals/sheet/00000008.png")))


@pytest.mark.slow
def test_what_is_left_out_is_said(held_out, tmp_path, capsys):
    config = evals_experiment.config(held_out, order=("pretrain", "text_to_image"))
    config.stages.pretrain.steps, config.stages.text_to_image.steps = 1, 1
    config.evals = dict(val=dict(mix=dict(other=1.0), batches=2), sheet=dict(prompts=("a",), stages=("joint",)))
    config.data.sources.other.kind = "read"  # it has no image to draw
    Trainer(config, tmp_path / "none").run(progress=False)
    said = capsys.readouterr().err
    assert said.count("evals.val leaves out the source 'other' in stage text_to_image") == 1 and "sheet" not in said
    assert [line["stage"] for line in of_evals(tmp_path / "none")] == ["pretrain"]
    config.data.source, config.order, config.evals["sheet"]["stages"] = held_out, ("pretrain",), ()
    Trainer(config, tmp_path / "source").run(progress=False)
    said = capsys.readouterr().err
    assert "evals.val is left out of stage pretrain: data.source stands" in said
    assert "evals.sheet is left out of stage pretrain" in said and not of_evals(tmp_path / "source")


@pytest.mark.parametrize(
    "prompts, saying",
    (
        (("a", "word " * 300), "stage joint: evals.sheet: the prompt 'word .* need .* max_positions, which is 256"),
        (("missing.jsonl",), "missing.jsonl cannot be read"),
        (("<|im_end|>",), "special token"),
        ((), "evals.sheet.prompts is empty"),
    ),
)
def test_prompts_are_checked_before_anything_is_trained(held_out, tmp_path, prompts, saying):
    config = evals_experiment.config(held_out)
    config.evals["sheet"]["prompts"] = prompts
    with pytest.raises(UserError, match=saying):
        Trainer(config, tmp_path / "run").run(progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.drill
def test_two_processes_find_the_same(trained, held_out, tmp_path):
    """Each reads its own groups, and process 0 draws the sheets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    train = [sys.executable, "-m", "starflow2_jax.cli", "train", "--config", ROOT / "tests/evals_experiment.py"]
    train += ["--out", tmp_path / "run", "--config.cpu_devices=2", "--distributed", "--coordinator", address]
    environment = {**os.environ, "HELD_OUT": held_out, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    started = [
        subprocess.Popen(
            list(map(str, [*train, "--processes", 2, "--process", process])),
            env=environment,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    for found, wanted in zip(of_evals(tmp_path / "run"), of_evals(trained), strict=True):
        assert found.keys() == wanted.keys() and found["step"] == wanted["step"]
        for name in found.keys() - {"step", "stage"}:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, err_msg=name)
    for sheet in (trained / "evals/sheet").iterdir():
        wanted, found = (
            np.asarray(Pillow.open(path), int) for path in (sheet, tmp_path / "run/evals/sheet" / sheet.name)
        )
        assert np.mean(np.abs(found - wanted)) < 1


def test_an_evaluation_from_outside(held_out, tmp_path, monkeypatch):
    """The example of docs/extending.md, run as it stands there."""
    for table in (EVALS, EVAL_OPTIONS):
        for kind, row in table.items():  # what the example adds goes with the test
            monkeypatch.setitem(table, kind, row)
        monkeypatch.setitem(table, "norm", None)
    text = (ROOT / "docs/extending.md").read_text().partition("## An evaluation while training")[2]
    (tmp_path / "norm.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    import_file(tmp_path / "norm.py")
    config = evals_experiment.config(held_out, evals=dict(norm=dict(every=4, group="shallow")))
    config.stages.pretrain.steps, config.stages.joint.steps = 0, 3
    Trainer(config, tmp_path / "run").run(progress=False)
    [line] = of_evals(tmp_path / "run")
    sampler = Sampler.restore(tmp_path / "run")
    assert line["step"] == 3 and line["norm/shallow"] > 1 and "shallow" in sampler.params
