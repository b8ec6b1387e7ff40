"""The FLOPs counted by hand are those of the compiled training step, in every stage."""

from dataclasses import replace
from functools import partial

import jax
import optax
import pytest
import tiny

from starflow2_jax.models.flops import Flops, training_flops
from starflow2_jax.models.pretzel import Pretzel, init_params, split
from starflow2_jax.parallel.hardware import CHIPS, Topology
from starflow2_jax.planning.costs import Analysis
from starflow2_jax.planning.hlo import Module
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES
from starflow2_jax.training.program import empty_batch
from starflow2_jax.training.step import Objective, make_step, new_state

ONE = Topology(CHIPS["v5e"], (1, 1))
SHAPE = Shape(2, 64, 8)


def compiled_flops(cfg, stage, shape) -> float:
    """FLOP of the matrix products in the step's compiled program; loops count as often as they run."""
    model, optimizer = Pretzel(cfg), optax.sgd(1.0)
    frozen, trainable = split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    held, rest = (frozen, trainable) if stage.name == "pretrain" else (trainable, frozen)
    state = jax.eval_shape(
        partial(new_state, stage=stage, optimizer=optimizer), held, key=jax.eval_shape(lambda: jax.random.key(0))
    )
    step = make_step(model, stage, optimizer, Objective(noise=0.1, vlm_length=shape.vlm_length))
    compiled = jax.jit(step).lower(state, rest, empty_batch(cfg, shape)).compile()
    costs = Analysis(Module(compiled.as_text()), ONE, {"data": 1}, jax.numpy.zeros((1, 2), int)).costs
    assert not costs.unknown
    return costs.flops


def config(remat: str):
    return replace(
        tiny.CONFIG,
        vlm=replace(tiny.CONFIG.vlm, remat=remat),
        shallow=replace(tiny.FLOW, remat=remat),
        deep=replace(tiny.FLOW, remat=remat, layers=3),
    )


@pytest.mark.parametrize(
    "name, shape, remat",
    [
        ("text_to_image", SHAPE, "none"),
        ("text_to_image", replace(SHAPE, vlm_length=16), "full"),
        ("image_to_text", SHAPE, "full"),
        ("image_to_text", replace(SHAPE, patches=32), "none"),
        ("joint", SHAPE, "none"),
        ("joint", SHAPE, "full"),
        ("joint", SHAPE, "dots"),
        ("text_to_image", SHAPE, "offload"),
        ("pretrain", replace(SHAPE, patches=32), "none"),
    ],
)
def test_by_hand_as_compiled(name, shape, remat):
    hand = training_flops(config(remat), STAGES[name], shape)
    assert compiled_flops(config(remat), STAGES[name], shape) == pytest.approx(hand.executed, rel=0.05)


def test_stages_leave_out_what_their_loss_does_not_need():
    count = {name: training_flops(tiny.CONFIG, STAGES[name], SHAPE).model for name in STAGES}
    short = training_flops(tiny.CONFIG, STAGES["text_to_image"], replace(SHAPE, vlm_length=16)).model
    assert short["VLM"] * 4 == count["text_to_image"]["VLM"]  # a quarter of the positions
    assert "adapter" not in short
    assert "deep flow" not in count["image_to_text"]
    assert count["image_to_text"]["VLM"] == 2 * count["text_to_image"]["VLM"]  # a gradient to the activations
    assert count["pretrain"]["VLM"] == 3 * count["text_to_image"]["VLM"]  # and to the weights
    assert count["joint"]["deep flow"] == count["text_to_image"]["deep flow"]


def test_trained_matrices_cost_six_per_parameter_and_token():
    deep = training_flops(tiny.CONFIG, STAGES["joint"], SHAPE).model["deep flow"]
    params = jax.eval_shape(lambda: init_params(tiny.MODEL, jax.random.key(0)))["deep"]
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 2)
    assert deep == 6 * matrices * SHAPE.rows * SHAPE.length


def test_utilisation():
    flops = Flops({"a": 6e12, "b": 2e12}, {"a": 9e12})
    assert flops.mfu(seconds=2.0, chips=4, peak=4e12) == 0.25
