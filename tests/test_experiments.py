"""The paper-size experiments: their shapes and counts without memory, and one step of each when shrunk."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from starflow2_jax.config import loading as configs
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.flops import training_flops
from starflow2_jax.models.pretzel import Pretzel, init_params, split
from starflow2_jax.parallel.hardware import CHIPS as TPUS
from starflow2_jax.parallel.hardware import parse_topology
from starflow2_jax.parallel.sharding import AXES, tree_shardings
from starflow2_jax.planning.costs import MARGIN
from starflow2_jax.planning.plan import settings
from starflow2_jax.stages import STAGES as STAGE_TABLE
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.program import batch_shape, require_rows
from starflow2_jax.training.step import new_state

EXPERIMENTS = Path(__file__).parents[1] / "starflow2_jax/experiments"
STAGES = {"t2i": "text_to_image", "adapter": "image_to_text", "joint": "joint"}
CHIPS = {"v5e": 256, "v5p": 64, "v6e": 256}
# Kept plan -> experiment's chip, topology, rows of the stages where they are not the experiment's own.
GPU_PLANS = {
    "h100x8": ("h100", "h100:8", 64),
    "h100x64": ("h100", "h100:8x8", None),
    "h100x512": ("h100", "h100:64x8", 4096),
    "a100x8": ("a100-80", "a100-80:8", None),
    "b200x8": ("b200", "b200:8", None),
    "h200x1": (None, "h200:1", None),
}
FROZEN = {"7b": 8.292, "3b": 3.755}  # billions of parameters of the published VLMs, tied head once


def count(tree) -> float:
    return sum(np.prod(x.shape, dtype=float) for x in jax.tree.leaves(tree)) / 1e9


@pytest.mark.parametrize("size", FROZEN)
@pytest.mark.parametrize("stage", STAGES)
def test_builds_at_full_size(size, stage):
    config = configs.load(EXPERIMENTS / f"starflow2_{size}_{stage}.py")
    assert config.order[-1] == STAGES[stage]
    model = Pretzel(configs.pretzel(config))
    frozen, trainable = split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    assert count(frozen) == pytest.approx(FROZEN[size], abs=1e-3)
    layers = count(
        [trainable["shallow"]["block_0"]["stack"], trainable["shallow"]["block_1"]["stack"], trainable["deep"]]
    )
    assert layers == pytest.approx(3.63, abs=0.01)  # 2 x 4 + 24 layers of width 3072
    assert 3.63 < count(trainable) < 3.72


@pytest.mark.parametrize("size", FROZEN)
def test_no_device_holds_more_than_small_parameters_whole(size):
    """On every mesh of the kept plans, of all parameters in fp32: biases, norms and embeddings of places."""
    model = Pretzel(configs.pretzel(configs.load(f"starflow2_{size}_joint")))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    plans = (EXPERIMENTS.parents[1] / "docs/benchmarks/plans").glob("*.json")
    sizes = {plan["mesh"]["fsdp"] for file in plans for plan in json.loads(file.read_text())}
    assert {8, 16, 64} <= sizes
    for fsdp in sizes - {1}:
        places = tree_shardings(params, jax.sharding.AbstractMesh((1, fsdp, 1, 1), AXES))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
        assert sum(x.size * x.dtype.itemsize for x, place in pairs if place.is_fully_replicated) < 12 * 2**20


@pytest.mark.parametrize(
    "experiment, chip",
    [(p.name, None) for p in sorted(EXPERIMENTS.glob("starflow2_*.py"))]
    + [(f"starflow2_7b_{stage}.py", chip) for stage in STAGES for chip in (*CHIPS, "h100")],
)
def test_rows_can_be_grouped_cut_and_spread(experiment, chip):
    """On a slice of 256, or as many devices as the mesh names."""
    config = configs.load(EXPERIMENTS / experiment, chip=chip)
    mesh = dict(config.mesh) | ({"data": 4, "fsdp": 64} if config.mesh.fsdp == -1 else {})
    sizes = [256 if mesh.get(axis, 1) == -1 else mesh.get(axis, 1) for axis in AXES]
    for name in config.order:
        require_rows(config, STAGE_TABLE[name], jax.sharding.AbstractMesh(tuple(sizes), AXES))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_planned_is_what_is_trained(stage, chip):
    """Settings, mesh and FLOP of the kept plans are the experiments' own for that chip; there they fit and are fast."""
    [kept] = json.loads((EXPERIMENTS.parents[1] / f"docs/benchmarks/plans/{stage}_{chip}.json").read_text())
    config = configs.load(EXPERIMENTS / f"starflow2_7b_{stage}.py", chip=chip)
    row = STAGE_TABLE[STAGES[stage]]
    assert settings(config, row) == kept["settings"]
    fsdp = 16 if chip == "v5p" else 64
    assert kept["mesh"] == dict.fromkeys(AXES, 1) | {"data": CHIPS[chip] // fsdp, "fsdp": fsdp}
    assert config.mesh.data == config.mesh.fsdp == -1
    summed = [c["bytes"] for c in kept["collectives"] if c["kind"] == "all-reduce" and "fsdp" in c["axis"]]
    assert sum(summed) < 2**28  # of norms and biases; the other gradients are reduce-scattered
    assert kept["topology"].startswith(chip) and kept["chips"] == CHIPS[chip]
    assert kept["fits"] and kept["whole"] == "" and kept["mfu"] >= (0.6 if stage != "adapter" else 0.5)
    counted = training_flops(configs.pretzel(config), row, batch_shape(config, row)).model
    assert kept["flops_by_hand"] == pytest.approx({part: flops / CHIPS[chip] for part, flops in counted.items()})
    reached = sum(kept["flops_by_hand"].values()) / kept["seconds"] / TPUS[chip].flops
    assert kept["mfu"] == pytest.approx(reached)


@pytest.mark.parametrize(
    "stage, name", [(s, name) for s in STAGES for name in GPU_PLANS if (s, name) != ("adapter", "h100x512")]
)
def test_what_is_planned_for_gpus_is_what_is_trained(stage, name):
    """The plans of one H200 are of the experiment `gpu`, whose last stage is the joint one."""
    chip, text, rows = GPU_PLANS[name]
    [kept] = json.loads((EXPERIMENTS.parents[1] / f"docs/benchmarks/plans/{stage}_{name}.json").read_text())
    overrides = [f"stages.*.rows={rows}"] if rows else []
    config = configs.load(EXPERIMENTS / f"starflow2_7b_{stage if chip else 'gpu'}.py", overrides, chip=chip)
    row, topology = STAGE_TABLE[STAGES[stage]], parse_topology(text)
    assert settings(config, row) == kept["settings"]
    fsdp = min(64, topology.chips)
    assert kept["topology"] == text
    assert kept["mesh"] == dict.fromkeys(AXES, 1) | {"data": topology.chips // fsdp, "fsdp": fsdp}
    assert kept["fits"] and kept["whole"] == "" and kept["peak"] < kept["memory"] == topology.chip.memory
    assert kept["mfu"] >= (0.5 if stage != "adapter" else 0.4)
    counted = training_flops(configs.pretzel(config), row, batch_shape(config, row))
    by_hand = {part: flops / topology.chips for part, flops in counted.model.items()}
    assert kept["flops_by_hand"] == pytest.approx(by_hand)
    assert kept["flops_compiled"] == pytest.approx(counted.executed / topology.chips, rel=0.05)
    assert kept["mfu"] == pytest.approx(sum(by_hand.values()) / kept["seconds"] / topology.chip.flops)
    assert kept["likely"] == pytest.approx([kept["seconds"] * margin for margin in MARGIN])


def test_a_chip_that_an_experiment_does_not_know():
    reason = "settings for the chips v5e, v5p, v6e, h100, a100-80, h200, b200, not for 'v4'"
    with pytest.raises(ConfigError, match=reason):
        configs.load("starflow2_7b_joint", chip="v4")
    with pytest.raises(ConfigError, match="has the same settings for all chips; leave out --chip v5e"):
        configs.load("digits_quick", chip="v5e")
    with pytest.raises(ConfigError, match="there is no experiment file .*none.py"):
        configs.load("none.py", chip="v5e")


@pytest.mark.parametrize(
    "optimizer", (dict(name="adamw", moments="bfloat16"), dict(name="adafactor", moments="float32"))
)
def test_one_gpu_holds_a_step_of_the_joint_stage(optimizer):
    """Arrays that live through a step, from their shapes, in a GPU's 139 GiB with 40 left for activations. (On an H200
    the activations of 4 rows took 28 GiB.)"""
    config = configs.load(EXPERIMENTS / "starflow2_7b_gpu.py").unlock()
    stage, cfg = STAGE_TABLE["joint"], config.stages.joint
    cfg.optimizer.update(optimizer)
    model = Pretzel(configs.pretzel(config))
    frozen, trainable = split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    make = partial(new_state, stage=stage, optimizer=make_optimizer(cfg.optimizer, cfg.steps), key=jax.random.key(0))
    state = jax.eval_shape(make, trainable)
    held = 2 * count(frozen) * 1e9 + 4 * count(trainable) * 1e9  # bfloat16 as published; fp32 gradients
    held += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves([state.params, state.ema, state.optimizer]))
    assert held < 99 * 2**30
    least = 2 * count(frozen) * 1e9 + 12 * count(trainable) * 1e9
    assert held > least  # nothing was left out


def test_one_gpu_takes_the_settings_that_were_fastest():
    """As docs/benchmarks/gpu.md measured them; the packed kernel gives its rows room for documents."""
    config = configs.load("starflow2_7b_gpu")
    kernels = {name: config.model[name].kernel for name in ("vlm", "shallow", "deep")}
    assert kernels == dict(vlm="cudnn_packed", shallow="cudnn", deep="cudnn_packed")
    assert {name: config.model[name].remat for name in kernels} == dict(vlm="full", shallow="dots", deep="dots")
    shapes = {name: batch_shape(config, STAGE_TABLE[name]) for name in config.order}
    assert {name: shape.rows for name, shape in shapes.items()} == dict(text_to_image=8, image_to_text=4, joint=4)
    assert {shape.documents for shape in shapes.values()} == {16}


@pytest.mark.slow
@pytest.mark.parametrize("size, stages", [("7b", tuple(STAGES)), ("3b", ("t2i",))])
def test_shrunk_every_stage_takes_a_step(tmp_path, size, stages):
    """One after the other in one directory, as the experiments' commands say. 3B: the later ones run no other code."""
    for number, stage in enumerate(stages, start=2):
        config = configs.load(EXPERIMENTS / f"starflow2_{size}_{stage}.py", runlocal=True)
        trainer = Trainer(config, tmp_path / "run")
        trainer.run(progress=False)
        assert trainer.checkpoints.steps.latest() == number
        assert trainer.checkpoints.steps.meta(number)["stage"] == STAGES[stage]
        lines = (tmp_path / "run/metrics/metrics.jsonl").read_text().splitlines()
        assert np.isfinite(json.loads(lines[-1])["loss"]) and json.loads(lines[-1])["stage"] == STAGES[stage]
