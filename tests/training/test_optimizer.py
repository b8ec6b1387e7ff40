"""The optimizers: what Muon does to a matrix, what it leaves to AdamW, the same on any mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import struct

from starflow2_jax.config.schema import FaultsConfig, OptimizerConfig
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import split
from starflow2_jax.parallel import sharding
from starflow2_jax.training.faults import guarded
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.step import TrainState, offloaded, state_shardings

RATE, DECAY = 1e-2, 0.1


@struct.dataclass
class Batch:
    segments: jax.Array


def optimizer(name: str, **changes):
    values = dict(
        learning_rate=RATE,
        final_fraction=1.0,
        warmup=0,
        b1=0.9,
        b2=0.95,
        weight_decay=DECAY,
        clip=1e9,
        moments="float32",
    )
    return make_optimizer(OptimizerConfig(name=name, **values | changes), 10)


def params() -> dict:
    return split(tiny.params())[1]


def gradients() -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params())


def first_update(name: str, **changes) -> dict:
    chain = optimizer(name, **changes)
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


def test_adamw_with_warm_up_cosine_and_clipping():
    """Against the update written out in float64: gradients above the norm are scaled down, norms and biases do not
    decay.
    """
    steps, warmup, clip, final = 10, 2, 1.5, 0.1
    chain = make_optimizer(
        OptimizerConfig(
            name="adamw", learning_rate=RATE, final_fraction=final, warmup=warmup, b1=0.9, b2=0.95, weight_decay=DECAY, clip=clip,
            moments="float32",
        ),
        steps,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    mine = {name: rng.standard_normal((4, 3)) for name in ("kernel", "embedding", "scale", "bias")}
    theirs = jax.tree.map(jnp.float32, mine)
    state, m, v = chain.init(theirs), *({name: np.zeros((4, 3)) for name in mine} for _ in range(2))
    for t in range(6):
        g = {name: (0.1 if t == 3 else 1.0) * rng.standard_normal((4, 3)) for name in mine}
        updates, state = chain.update(jax.tree.map(jnp.float32, g), state, theirs)
        theirs = jax.tree.map(jnp.add, theirs, updates)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert (norm > clip) == (t != 3)
        cosine = 0.5 * (1 + np.cos(np.pi * (t - warmup) / (steps - warmup)))
        rate = RATE * (t / warmup if t < warmup else final + (1 - final) * cosine)
        for name, x in g.items():
            x = x * min(1, clip / norm)
            m[name], v[name] = 0.9 * m[name] + 0.1 * x, 0.95 * v[name] + 0.05 * x**2
            step = m[name] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[name] / (1 - 0.95 ** (t + 1))) + 1e-8)
            mine[name] = mine[name] - rate * (step + DECAY * mine[name] * (name in ("kernel", "embedding")))
    for name in mine:
        np.testing.assert_allclose(theirs[name], mine[name], rtol=1e-5, atol=1e-6)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="name must be one of adamw, muon, adafactor, not 'sgd'"):
        optimizer("sgd")


def matrix(rows: int, columns: int) -> dict:
    return {"kernel": np.random.default_rng(2).standard_normal((rows, columns)).astype(np.float32)}


def test_adafactor_keeps_two_vectors_of_a_matrix():
    """Its first update, written out: the gradient over the root of an outer product of row and column means."""
    chain, p, g = optimizer("adafactor"), matrix(256, 128), matrix(128, 256)["kernel"].T
    state = chain.init(p)
    assert sum(x.size for x in jax.tree.leaves(state)) < 256 + 128 + 8
    update = chain.update({"kernel": g}, state, p)[0]["kernel"]
    square = np.float64(g) ** 2 + 1e-30
    scaled = g / np.sqrt(np.outer(square.mean(1), square.mean(0)) / square.mean())
    scaled /= max(1.0, np.sqrt((scaled**2).mean()))
    np.testing.assert_allclose(update, -RATE * (scaled + DECAY * p["kernel"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ("adamw", "muon"))
def test_moments_in_bfloat16(name):
    """Half the bytes, and after some steps nearly the same parameters."""

    def run(moments):
        chain, p = optimizer(name, moments=moments), params()
        state = chain.init(p)
        update = jax.jit(chain.update)
        for i in range(4):
            updates, state = update(jax.tree.map(lambda g, i=i: g * (1 + i), gradients()), state, p)
            p = jax.tree.map(lambda a, u: a + u, p, updates)
        return p, sum(x.nbytes for x in jax.tree.leaves(state))

    (half, bytes_half), (full, bytes_full) = run("bfloat16"), run("float32")
    assert bytes_half < 0.51 * bytes_full
    for a, b, start in zip(*map(jax.tree.leaves, (half, full, params())), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b - start)


def test_moments_that_would_stand_still_are_refused():
    with pytest.raises(UserError, match="needs b1 and b2 of at most 0.99"):
        optimizer("adamw", moments="bfloat16", b2=0.999)
    with pytest.raises(UserError, match="adafactor's average stand still; set it to 'float32'"):
        optimizer("adafactor", moments="bfloat16")
    with pytest.raises(UserError, match="moments must be one of float32, bfloat16, not 'int8'"):
        optimizer("adamw", moments="int8")


def test_what_is_offloaded_stays_in_the_hosts_memory():
    """Through a compiled, donating step on a mesh that may skip its update; all of it, counts too, and the update is
    the same.
    """
    mesh, p, g = sharding.make_mesh(data=2, fsdp=4), matrix(64, 32), matrix(64, 32)
    batch, kinds, params = Batch(np.ones((8, 4), np.int32)), {}, {}
    chain = optimizer("adamw")

    def update(state, frozen, batch):
        updates, kept = chain.update(g, state.optimizer, state.params)
        new = state.replace(params=jax.tree.map(jnp.add, state.params, updates), optimizer=kept)
        return new, {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}

    for offload in (False, True):
        state = TrainState(np.int32(0), None, p, p, chain.init(p))
        state = jax.device_put(state, state_shardings(state, mesh, offload))
        step = guarded(update, FaultsConfig(nonfinite="skip", spike="skip"))
        step = jax.jit(offloaded(step) if offload else step, donate_argnums=0)
        with jax.set_mesh(mesh):
            compiled = step.lower(state, {}, batch).compile()  # takes only what lies where it was said to
            for _ in range(2):
                state, _ = compiled(state, {}, batch)
        kinds[offload] = {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer)}
        params[offload] = state.params["kernel"]
    assert kinds[True] == {"pinned_host"} and "pinned_host" not in kinds[False]
    np.testing.assert_allclose(params[True], params[False], rtol=1e-6)
    assert np.abs(params[True] - p["kernel"]).max() > RATE


def test_factors_scale_the_updates_of_their_groups_alone():
    plain, scaled = first_update("muon"), first_update("muon", factors=dict(deep=0.5, w_d=0.0))
    for group, factor in dict(deep=0.5, w_d=0.0, w_vlm=1.0, shallow=1.0).items():
        expected = optax.tree.scale(factor, plain[group])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), scaled[group], expected)


def test_a_factor_of_a_group_that_is_not_trained_is_refused():
    message = "optimizer.factors names vlm, which this stage does not train; it trains "
    with pytest.raises(UserError, match=message):
        first_update("adamw", factors=dict(vlm=0.5))
