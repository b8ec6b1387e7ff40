"""The optimizers: what Muon does to a matrix, what it leaves to AdamW, the same on any mesh."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax import sharding
from starflow2_jax.config import ConfigError
from starflow2_jax.models.pretzel import split
from starflow2_jax.training.optimizer import make_optimizer

RATE, DECAY = 1e-2, 0.1


def optimizer(name: str):
    values = dict(learning_rate=RATE, final_fraction=1.0, warmup=0, b1=0.9, b2=0.95, weight_decay=DECAY, clip=1e9)
    return make_optimizer(SimpleNamespace(name=name, **values), 10)


def params() -> dict:
    return split(tiny.params())[1]


def gradients() -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params())


def first_update(name: str) -> dict:
    chain = optimizer(name)
    return jax.jit(lambda g, p: chain.update(g, chain.init(p), p)[0])(gradients(), params())


@pytest.mark.parametrize(
    "kernel, inputs",
    [(("attention", "query"), 32), (("attention", "key"), 32), (("attention", "out"), 32), (("mlp", "up"), 32),
     (("mlp", "down"), 64)],
)  # fmt: skip
def test_muon_orthogonalises_each_layers_matrix(kernel, inputs):
    """Without its decay an update is U V^T of its momentum U S V^T: of AdamW's usual size, along the gradient."""
    update, before, gradient = (
        np.asarray(tree["deep"]["layers"][kernel[0]][kernel[1]]["kernel"]).reshape(2, inputs, -1)
        for tree in (first_update("muon"), params(), gradients())
    )
    moved = (update + RATE * DECAY * before) / (-RATE * 0.2 * max(update.shape[1:]) ** 0.5)
    for layer, g in zip(moved, gradient, strict=True):
        u, _, v = np.linalg.svd(g, full_matrices=False)
        assert 0.7 < np.median(np.linalg.svd(layer, compute_uv=False)) < 1.2  # what five iterations come to
        assert np.vdot(layer, u @ v) / np.linalg.norm(layer) / np.linalg.norm(u @ v) > 0.96


def test_muon_leaves_the_rest_to_adamw():
    same = 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(first_update("muon")), jax.tree.leaves(first_update("adamw")), strict=True
    ):
        name = sharding.path_name(path)
        stack = "/layers/" in name and name.endswith("kernel")
        assert np.array_equal(a, b) != stack, name
        same += not stack
    assert same > 20


def test_muon_on_eight_devices_is_muon_on_one():
    mesh, chain = sharding.make_mesh(data=2, fsdp=2, tensor=2), optimizer("muon")
    with jax.set_mesh(mesh):
        g, p = (jax.device_put(t, sharding.tree_shardings(t, mesh)) for t in (gradients(), params()))
        spread = jax.jit(lambda g, p: chain.update(g, chain.init(p), p)[0])(g, p)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(first_update("muon")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ConfigError, match="optimizer.name is 'adamw', 'adafactor' or 'muon', not 'sgd'"):
        optimizer("sgd")
