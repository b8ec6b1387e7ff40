"""Remat policies give the same gradients from fewer saved values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.errors import UserError
from starflow2_jax.models.layers import REMAT, Transformer, TransformerConfig

CONFIG = TransformerConfig(layers=2, width=32, heads=2, mlp_hidden=64)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 32)), jnp.float32)
PARAMS = Transformer(CONFIG).init(jax.random.key(0), X, None)


def gradient(policy):
    model = Transformer(replace(CONFIG, remat=policy))
    return jax.grad(lambda params: jnp.sum(model.apply(params, X, None)[0] ** 2))


@pytest.mark.parametrize("policy", REMAT)
def test_gradients_are_the_same(policy):
    for a, b in zip(*map(jax.tree.leaves, (jax.jit(gradient(policy))(PARAMS), gradient("none")(PARAMS))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def test_what_is_computed_again():
    """Matrix products of a gradient, by its trace: of weights only under "full"; of attention under "dots" too."""
    programs = {policy: str(jax.make_jaxpr(gradient(policy))(PARAMS)) for policy in REMAT}
    products = {policy: text.count("dot_general") for policy, text in programs.items()}
    assert products["none"] < products["dots"] < products["full"] == products["offload"]
    assert "pinned_host" in programs["offload"] or "<host>" in programs["offload"]


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="remat must be one of none, full, dots, offload, not 'some'"):
        gradient("some")(PARAMS)
