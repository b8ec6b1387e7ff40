"""The benchmarks count and time the right things. No test asserts a measured speed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from tiny_experiment import tiny_config

from starflow2_jax import cli
from starflow2_jax.benchmarks import checkpoint, data, program, synthetic, train
from starflow2_jax.config import loading as configs
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.errors import ConfigError
from starflow2_jax.models import flops
from starflow2_jax.models.pretzel import init_params
from starflow2_jax.stages import STAGES
from starflow2_jax.training.program import batch_shape, find_stage

EXPERIMENT = Path(__file__).parents[1] / "starflow2_jax/experiments/digits_quick.py"
SMALL = [
    *(f"model.{part}.layers=1" for part in ("deep", "shallow", "vlm", "vlm.vision")),
    "model.shallow_blocks=1",
    "stages.text_to_image.rows=8",
    "stages.text_to_image.optimizer.name=adamw",
    "stages.text_to_image.length=64",
    "stages.text_to_image.images=2",
]


def config(*more: str) -> ConfigDict:
    return configs.load(EXPERIMENT, [*SMALL, *more], runlocal=True)


@pytest.mark.parametrize("given, name", [(None, "joint"), ("1", "text_to_image"), ("image_to_text", "image_to_text")])
def test_which_stage(given, name):
    assert find_stage(config(), given).name == name


@pytest.mark.parametrize("given", ["5", "0", "t2i"])
def test_an_unknown_stage_is_named(given):
    with pytest.raises(ConfigError, match=f"no stage '{given}' in this config; name one of image_to_text, joint"):
        find_stage(config(), given)


def test_training(tmp_path, monkeypatch):
    monkeypatch.setitem(train.MATRIX, "cpu", 128)
    cfg = config()
    found = train.measure(cfg, "text_to_image", 2, tmp_path / "none", tmp_path / "trace")
    assert json.loads(json.dumps(found)) == found and not (tmp_path / "none").exists()
    stage, seconds = STAGES["text_to_image"], found["step_seconds"]
    assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    counted = flops.training_flops(configs.pretzel(cfg), stage, batch_shape(cfg, stage)).total
    assert found["flop_per_step"] == counted == pytest.approx(sum(found["flop_by_part"].values()))
    peak = found["peak"]["flop_per_second_and_device"]
    assert found["mfu"] == pytest.approx(counted / (seconds["median"] * 8 * peak))  # eight devices
    assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / seconds["median"])
    assert 0.3 * 8 * 64 < found["tokens_per_step"] < 8 * 64
    params = jax.eval_shape(lambda: init_params(program.Trainer(cfg, tmp_path).model, jax.random.key(0)))
    held = 4 * sum(x.size for x in jax.tree.leaves(params))
    assert found["memory"]["compiled"]["argument"] > held  # all parameters, average and moments are arguments
    shares = [op["share"] for op in found["profile"]]
    assert 1 < len(shares) <= 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6
    assert any("dot" in op["operation"] or "fusion" in op["operation"] for op in found["profile"])


@pytest.mark.slow
def test_a_compiled_step_takes_what_it_gave(tmp_path):
    """On any mesh, with the optimizer in the host's memory and a policy that may skip an update."""
    cfg = tiny_config(mesh=dict(data=2, fsdp=2, tensor=2), faults=dict(nonfinite="skip", spike="skip"))
    cfg.stages.pretrain.optimizer.offload = True
    built = program.build(cfg, "pretrain", tmp_path / "none")
    for _ in range(2):
        loss = built.run()["loss"]
    assert np.isfinite(loss) and int(built.state.step) == 2


def test_matrix_peak_is_of_one_device(monkeypatch):
    """The clock is a stand-in: a product takes two seconds."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    monkeypatch.setitem(train.MATRIX, "cpu", 64)
    assert train.matrix_peak(jax.devices()[:4], "float32") == 2 * 64**3 / 2


def test_data(tmp_path):
    cfg = config()
    found = data.measure(cfg, "text_to_image", 4, tmp_path)
    trainer = program.Trainer(cfg, tmp_path)
    stream = trainer.task("text_to_image").batches()
    next(stream)
    batches = [next(stream)[0] for _ in range(4)]
    ends = trainer.tokenizer.convert_tokens_to_ids("<|im_end|>")  # each document ends with one
    documents = sum(int((b.tokens == ends).sum()) for b in batches)
    assert found["documents_per_row"] == documents / (4 * 8)
    filled = np.mean([b.segments > 0 for b in batches])
    assert found["packing_efficiency"] == pytest.approx(filled) and 0.5 < filled < 1
    assert found["tokens_per_second"] / found["documents_per_second"] == pytest.approx(filled * 4 * 8 * 64 / documents)


def test_documents_and_tokens_of_a_batch():
    batch = tiny.packed()
    assert data.documents_in(batch) == len(tiny.places(batch))
    assert data.tokens_in(batch) == sum(len(where) for *_, where in tiny.places(batch))


def test_checkpoints(tmp_path):
    cfg = config()
    found = checkpoint.measure(cfg, "text_to_image", 2, tmp_path)
    assert found["stall_seconds"] <= found["write_seconds"] and found["restore_seconds"] > 0
    model = program.Trainer(cfg, tmp_path / "new").model
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items() if name != "vlm"}
    moving = sum(count[name] for name in STAGES["text_to_image"].trains)
    plain = 4 * (sum(count.values()) + 3 * moving)  # parameters, their average, two moments
    assert 0.5 * plain < found["bytes"] < 1.2 * plain  # compressed, and with descriptions


@pytest.mark.parametrize("kind", ["patch", "latents", "fae"])
@pytest.mark.parametrize("stage", ["text_to_image", "image_to_text", "joint"])
def test_synthetic_documents(tmp_path, kind, stage):
    cfg = config().unlock()
    if kind == "latents":
        cfg.codec = dict(kind="latents", grid=(4, 4), channels=4)
    if kind == "fae":  # of a folder that is not here
        cfg.codec = dict(kind="fae", path="", grid=(4, 4), channels=4)
    synthetic.use(cfg, STAGES[stage], tmp_path, words=5)
    assert cfg.codec.kind == ("patch" if kind == "patch" else "latents")
    documents = JsonlDocuments(cfg.data.source)
    makes = [any(getattr(part, "generate", False) for part in document) for document in documents]
    says = [any(getattr(part, "predict", False) for part in document) for document in documents]
    assert len(makes) == synthetic.DOCUMENTS
    assert any(makes) == STAGES[stage].image_loss and any(says) == STAGES[stage].text_loss
    trainer = program.Trainer(cfg.lock(), tmp_path / "new")
    assert data.tokens_in(next(trainer.task(stage).batches())[0]) > 0


def test_the_command(tmp_path, capsys):
    given = ["--config", str(EXPERIMENT), "--config.cpu_devices=8"]  # as many as the tests have already
    rows = "stages.text_to_image.rows=8"
    data_bench = ["bench", "data", *given, f"--config.{rows}", "--stage", "1", "--steps", "1"]
    assert cli.main([*data_bench, "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert (found["bench"], found["stage"], found["overrides"]) == ("data", "text_to_image", ["cpu_devices=8", rows])
    assert cli.main(["bench", "train", *given, "--steps", "0"]) == 2
    assert cli.main(["bench", "train", *given, "--stage", "9"]) == 2
