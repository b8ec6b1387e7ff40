"""The FLOP of a codec's stages counted by hand are those of the compiled step."""

from copy import deepcopy

import jax
import numpy as np
import pytest
import tiny_codec_training

from starflow2_jax.config import loading
from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.hardware import CHIPS, Topology
from starflow2_jax.planning.costs import Analysis
from starflow2_jax.planning.hlo import Module
from starflow2_jax.stages import CODEC_STAGES
from starflow2_jax.training.codec.flops import codec_flops
from starflow2_jax.training.codec.task import CodecTask

SIZES = dict(width=64, heads=2, mlp_hidden=96)
LPIPS = dict(lpips_vgg="vgg.pth", lpips_linear="linear.pth")


def task(name: str, remat: str = "none", critic: dict | None = None, losses: dict | None = None) -> CodecTask:
    c = deepcopy(tiny_codec_training.config(**LPIPS))
    c["encoder"] |= dict(SIZES, layers=3, remat=remat, patch=8)  # no picture is resized
    c["networks"] |= dict(features=64, attention_head_dim=32, remat=remat)
    c["networks"]["feature_decoder"] |= dict(layers=2, head_dim=32, mlp_hidden=96)
    c["networks"]["pixel_decoder"] |= dict(SIZES, layers=2, head_dim=32)
    stage = c["stages"][name]
    stage["critic"] = dict(tiny_codec_training.CRITIC, channels=8, **critic) if critic else dict(kind="none")
    if losses:
        stage["losses"] = losses
    if not CODEC_STAGES[name].pixels:
        del stage["critic"]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return CodecTask(loading.complete(c), CODEC_STAGES[name], mesh)


PERCEPTUAL = dict(perceptual=1.0, perceptual_layers=(1, 2))


@pytest.mark.parametrize(
    "name, how",
    [
        ("encoder", dict()),
        ("encoder", dict(remat="full")),
        ("features", dict()),
        ("features", dict(remat="full")),
        ("pixels", dict()),
        ("pixels", dict(losses=PERCEPTUAL)),
        ("pixels", dict(losses=dict(lpips=1.0))),
        ("pixels", dict(critic=dict(kind="patch"))),
        ("vae", dict(losses=PERCEPTUAL)),
        ("vae", dict(critic=dict(kind="patch"), remat="full")),
        ("pixels_tuned", dict(critic=dict(kind="features", layers=(1, 3)), losses=PERCEPTUAL, remat="dots")),
    ],
    ids=str,
)
def test_by_hand_as_compiled(name, how):
    own = task(name, **how)
    state, batch = own.abstract_state(), own.abstract_batch()
    frozen = own.abstract_frozen()
    with jax.set_mesh(own.mesh):
        compiled = own.step().lower(state, frozen, batch, np.float32(0)).compile()
    one = Topology(CHIPS["v5e"], (1, 1))
    costs = Analysis(Module(compiled.as_text()), one, {"data": 1}, np.zeros((1, 2), int)).costs
    assert not costs.unknown
    hand = codec_flops(own.networks, own.stage, own.cfg)
    assert costs.flops == pytest.approx(hand.executed, rel=0.05)
    assert own.flops == hand.total <= hand.executed


def test_the_batch_that_is_planned_is_the_one_that_is_read():
    own = task("features")
    reader = own.batches()
    batch = reader.place(next(reader), sharding.batch_sharding(own.mesh))
    found, wanted = (jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), b) for b in (batch, own.abstract_batch()))
    assert found == wanted
