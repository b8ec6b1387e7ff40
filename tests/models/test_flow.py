"""The flow against autodiff: log-determinants, scan order, inversion, for every option of a block."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.models.flow import Context, Flow, FlowBlock, FlowBlockConfig, alternating
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.sampling import guidance

PLAIN = TransformerConfig(
    layers=2, width=8, heads=2, mlp_hidden=16, norm="layer", norm_eps=1e-5, qkv_bias=True, out_bias=True, mlp_bias=True
)
GATED = TransformerConfig(
    layers=1,
    width=8,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_hidden=12,
    norm="rms_zero",
    activation="gelu_tanh",
    gated_mlp=True,
    qk_norm="rms_zero",
    post_norm=True,
    remat="full",
)
WIDE = replace(PLAIN, norm="rms", norm_eps=1e-6, heads=1, head_dim=20)  # rotary pairs for rows, columns and text
GRID, D, B = (2, 3), 2, 2
N = GRID[0] * GRID[1]
TARFLOW = FlowBlockConfig(GRID, D, PLAIN, start="shift", scale="exp", positions="learned", classes=3)
STARFLOW = FlowBlockConfig(GRID, D, WIDE, soft_clip=4.0, rotary_text=True, final_norm=True)
CONFIGS = {
    "shift, exp, learned, classes": TARFLOW,
    "shift, exp, learned, classes, flip": replace(TARFLOW, flip=True),
    "token, softplus, rotary": FlowBlockConfig(GRID, D, PLAIN),
    "token, softplus, rotary, gated, grouped, flip, side": FlowBlockConfig(GRID, D, GATED, flip=True, rotary_side=7),
    "shift, softplus, rotary, unrolled, final norm": FlowBlockConfig(
        GRID, D, replace(PLAIN, unroll=2), start="shift", final_norm=True
    ),
    "text rotary, soft clip, final norm": STARFLOW,
    "text rotary, soft clip, final norm, prefix, flip": replace(STARFLOW, prefix_channels=3, flip=True),
    "shift, learned, soft clip, prefix": replace(TARFLOW, classes=0, prefix_channels=3, soft_clip=1.5),
}
BLOCKS = pytest.mark.parametrize("name", CONFIGS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def context_of(cfg: FlowBlockConfig, seed: int = 0) -> Context:
    label = (np.arange(B) + seed) % cfg.classes if cfg.classes else None
    return Context(label, normal(10 + seed, B, 4, cfg.prefix_channels) if cfg.prefix_channels else None)


def random_params(module, *inputs) -> dict:
    """Parameters all random, so that none is left at an initial zero or one."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * normal(i, *x.shape)) for i, x in enumerate(leaves)])


@functools.cache
def build(name: str) -> SimpleNamespace:
    """A block's parameters, its output for h, and its inverse of that output."""
    cfg = CONFIGS[name]
    block, context, h = FlowBlock(cfg), context_of(cfg), 1.5 * normal(1, B, N, D)
    params = random_params(block, h, context)
    forward = functools.partial(block.apply, params)

    @jax.jit
    def run(h, context):
        z, logdet = forward(h, context)
        return z, logdet, forward(z, context, method=FlowBlock.inverse)

    z, logdet, back = run(h, context)
    return SimpleNamespace(
        cfg=cfg,
        context=context,
        params=params,
        h=h,
        z=z,
        logdet=logdet,
        back=back,
        forward=lambda h, context: run(h, context)[:2],
    )


def float64(tree):
    """The tree's fp32 arrays as float64; under `jax.enable_x64`."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else x, tree)


@functools.cache
def exact(name: str) -> SimpleNamespace:
    """The same in float64, with the Jacobian (B, N, D, N, D) by autodiff."""
    b = build(name)
    block = FlowBlock(replace(b.cfg, transformer=replace(b.cfg.transformer, dtype="float64")))
    with jax.enable_x64(True):
        params, h, context = float64((b.params, b.h, b.context))
        forward = functools.partial(block.apply, params)

        @jax.jit
        def run(h, context):
            one = jax.jacfwd(lambda h, c: forward(h[None], jax.tree.map(lambda x: x[None], c))[0][0])
            return *forward(h, context), jax.vmap(one)(h, context)

        z, logdet, J = map(np.asarray, run(h, context))
    assert z.dtype == logdet.dtype == J.dtype == np.float64
    return SimpleNamespace(z=z, logdet=logdet, J=J)


def scan(x, cfg, axis=1):
    """Raster order -> the order in which the block reads its tokens."""
    return np.flip(x, axis) if cfg.flip else np.asarray(x)


@BLOCKS
def test_inverse(name):
    b = build(name)
    np.testing.assert_allclose(b.back, b.h, atol=1e-4)
    assert np.abs(b.z - b.h).max() > 0.1


@BLOCKS
def test_log_determinant(name):
    """The log-determinant in float64; the fp32 result equals it to the precision of fp32."""
    e = exact(name)
    sign, expected = np.linalg.slogdet(e.J.reshape(B, N * D, N * D))
    np.testing.assert_allclose(e.logdet.sum((1, 2)), expected, atol=1e-9)
    assert (sign == 1).all() and np.abs(expected).min() > 1e-2
    np.testing.assert_allclose(e.logdet, np.log(np.einsum("bndnd->bnd", e.J)), atol=1e-9)
    np.testing.assert_allclose(build(name).logdet, e.logdet, atol=1e-4)
    np.testing.assert_allclose(build(name).z, e.z, atol=1e-4)


@BLOCKS
def test_jacobian_is_triangular_in_scan_order(name):
    b = build(name)
    J = scan(scan(exact(name).J, b.cfg, 1), b.cfg, 3)
    for n in range(N):
        own = J[:, n, :, n]
        assert (J[:, n, :, n + 1 :] == 0).all()
        assert (own == own * np.eye(D)).all()
        # each token depends on every earlier one; without a start token, the first is what it was
        assert n == 0 or (np.abs(J[:, n, :, :n]).max((1, 3)) > 1e-5).all()
    if b.cfg.start == "shift":
        np.testing.assert_array_equal(scan(b.z, b.cfg)[:, 0], scan(b.h, b.cfg)[:, 0])
    else:
        assert np.abs(scan(b.z, b.cfg)[:, 0] - scan(b.h, b.cfg)[:, 0]).max() > 1e-2


@BLOCKS
def test_later_tokens_change_nothing(name):
    b = build(name)
    for i in range(N - 1):
        changed = scan(b.h, b.cfg).copy()
        changed[:, i + 1 :] = 100 * normal(i, B, N - i - 1, D)
        z, logdet = b.forward(np.ascontiguousarray(scan(changed, b.cfg)), b.context)
        for new, old in ((z, b.z), (logdet, b.logdet)):
            np.testing.assert_array_equal(scan(new, b.cfg)[:, : i + 1], scan(old, b.cfg)[:, : i + 1])
        np.testing.assert_array_equal(scan(logdet, b.cfg)[:, i + 1], scan(b.logdet, b.cfg)[:, i + 1])


@BLOCKS
def test_context_is_read(name):
    b = build(name)
    z, logdet = b.forward(b.h, context_of(b.cfg, seed=1))
    differs = bool(b.cfg.classes or b.cfg.prefix_channels)
    first = int(b.cfg.start == "shift")
    changed = np.abs(scan(z - b.z, b.cfg)[:, first:]).max((0, 2)) > 1e-5
    assert (changed == differs).all()
    assert (np.abs(logdet - b.logdet).max() > 1e-5) == differs


def test_null_class():
    """A negative label, or none, is the mean of the class embeddings."""
    block = FlowBlock(TARFLOW)
    h = normal(0, B, N, D)
    params = random_params(block, h, Context(jnp.zeros(B, jnp.int32)))
    mean = jax.tree.map(jnp.copy, params)
    embedding = params["params"]["class_embedding"]
    mean["params"]["class_embedding"] = jnp.broadcast_to(embedding.mean(0), embedding.shape)
    forward = jax.jit(block.apply)
    expected = forward(mean, h, Context(np.array([0, 2])))[0]
    np.testing.assert_allclose(forward(params, h, Context(np.array([-1, -1])))[0], expected, atol=1e-5)
    np.testing.assert_allclose(forward(params, h)[0], expected, atol=1e-5)
    one = forward(params, h, Context(np.array([-1, 2])))[0]
    np.testing.assert_allclose(one[0], expected[0], atol=1e-5)
    assert np.abs(one[1] - expected[1]).max() > 1e-3


def test_rotary_prefix_needs_its_rows():
    with pytest.raises(ValueError, match="rotary_text"):
        replace(STARFLOW, prefix_channels=3, rotary_text=False)


def test_bfloat16_keeps_the_affine_part_in_float32():
    """Later tokens may amplify a token's rounding, so medians are compared; they are about 0.01."""
    cfg = replace(STARFLOW, transformer=replace(GATED, head_dim=20, dtype="bfloat16"), prefix_channels=3)
    block, h, context = FlowBlock(cfg), normal(0, B, N, D), context_of(cfg)
    params = random_params(block, h, context)
    z, logdet = jax.jit(block.apply)(params, h, context)
    assert z.dtype == logdet.dtype == jnp.float32
    exact = jax.jit(FlowBlock(replace(cfg, transformer=replace(cfg.transformer, dtype="float32"))).apply)
    assert np.median(np.abs(z - exact(params, h, context)[0])) < 0.04
    back = jax.jit(functools.partial(block.apply, method=FlowBlock.inverse))(params, z, context)
    assert back.dtype == jnp.float32
    assert np.median(np.abs(back - h)) < 0.04


GUIDES = {"mixing": guidance.gaussian_mixing, "linear": lambda weight: guidance.linear(weight, N)}


@functools.cache
def chain() -> SimpleNamespace:
    """A shallow block and a deep one with a prefix; z, and two contexts to guide between."""
    shallow = replace(STARFLOW, transformer=replace(WIDE, layers=1))
    blocks = alternating(shallow, 2)
    blocks = (blocks[0], replace(blocks[1], prefix_channels=3))
    flow, z = Flow(blocks), normal(2, B, N, D)
    contexts = [context_of(blocks[-1], seed) for seed in (0, 1)]
    params = random_params(flow, z, contexts[0])
    inverse = jax.jit(functools.partial(flow.apply, params, method=Flow.inverse))

    @functools.partial(jax.jit, static_argnums=0)
    def guided(kind, context, unconditional, weight, temperature=1.0):
        return flow.apply(params, z, context, unconditional, GUIDES[kind](weight), temperature, method=Flow.inverse)

    return SimpleNamespace(flow=flow, params=params, z=z, contexts=contexts, inverse=inverse, guided=guided)


def test_alternating():
    assert [block.flip for block in alternating(STARFLOW, 5)] == [False, True, False, True, False]
    assert [block.flip for block in alternating(STARFLOW, 4, flip_odd=False)] == [True, False, True, False]
    assert {replace(block, flip=False) for block in alternating(STARFLOW, 5)} == {STARFLOW}


def test_chain():
    """The chain's log-determinant is that of its (dense) Jacobian; each block reads against the one before."""
    c, h = chain(), normal(1, B, N, D)
    flow = Flow(tuple(replace(b, transformer=replace(b.transformer, dtype="float64")) for b in c.flow.blocks))
    with jax.enable_x64(True):
        params, x, prefix = float64((c.params, h, c.contexts[0].prefix))
        trace = functools.partial(flow.apply, params, method=Flow.trace)

        @jax.jit
        def run(x):
            J = jax.jacfwd(lambda x: trace(x[None], Context(prefix=prefix[:1]))[0])(x[0])
            return trace(x, Context(prefix=prefix)), flow.apply(params, x, Context(prefix=prefix)), J

        (states, logdets), (z, logdet), J = jax.tree.map(np.asarray, run(x))
    assert z.dtype == logdet.dtype == np.float64
    np.testing.assert_allclose(z, states[-1], atol=1e-12)
    np.testing.assert_allclose(logdet, sum(logdets), atol=1e-12)
    np.testing.assert_allclose(c.inverse(z.astype(np.float32), c.contexts[0]), h, atol=1e-4)
    first, total = (j[0] for j in J)  # (N, D, N, D)
    expected = np.linalg.slogdet(total.reshape(N * D, N * D))[1]
    np.testing.assert_allclose(logdet[0].sum(), expected, rtol=1e-7)  # attention's logits are fp32 all the same
    reads_first, reads = (np.abs(j).max((1, 3)) > 1e-6 for j in (first, total))
    assert (reads_first == np.tril(np.ones((N, N), bool))).all() and reads.all()


@pytest.mark.parametrize("kind", GUIDES)
def test_guidance(kind):
    """Only weight 0, or an unconditional pass equal to the conditional one, gives the conditional sample."""
    c = chain()
    conditional = c.inverse(c.z, c.contexts[0])
    np.testing.assert_allclose(c.guided(kind, *c.contexts, 0.0), conditional, atol=1e-5)
    np.testing.assert_allclose(c.guided(kind, c.contexts[0], c.contexts[0], 2.0), conditional, atol=1e-4)
    assert np.abs(c.guided(kind, *c.contexts, 2.0) - conditional).max() > 1e-2
    assert np.abs(c.guided(kind, c.contexts[0], c.contexts[0], 2.0, 3.0) - conditional).max() > 1e-3


def test_guidance_acts_only_where_there_is_a_condition():
    """Only the deep block of the chain is guided and tempered; the shallow one inverts its output without guidance."""
    c = chain()
    shallow, deep = (
        functools.partial(FlowBlock(cfg).apply, {"params": c.params["params"][f"block_{i}"]}, method=FlowBlock.inverse)
        for i, cfg in enumerate(c.flow.blocks)
    )
    h = jax.jit(lambda z: shallow(deep(z, *c.contexts, guidance.gaussian_mixing(2.0), 3.0)))(c.z)
    np.testing.assert_allclose(c.guided("mixing", *c.contexts, 2.0, 3.0), h, atol=1e-5)
