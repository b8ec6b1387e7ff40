"""Inversion by chunks: the solver against a loop over tokens, the flow's inverse against its forward pass;
calibration.
"""

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax import cli
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.reading import CheckpointError
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Text
from starflow2_jax.models.flow import Context, Flow, FlowBlock, FlowBlockConfig
from starflow2_jax.models.jacobi import GUESSES, SEQUENTIAL, Jacobi, solve
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.pretzel import split
from starflow2_jax.sampling import calibration, guidance, inversion
from starflow2_jax.sampling.calibration import Conditions, Measurement, calibrate, calibrate_deep, candidates, fastest
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.inversion import Inversion

QUICK = Path(__file__).parents[2] / "starflow2_jax/experiments" / "digits_quick.py"

# The solver, on a map of which everything is known. What it remembers of earlier tokens is `seen`, written as a cache
# is.

TOKENS, CHANNELS = 7, 2
COUPLING = np.array([0.05, 0.4, 0.0, 1.5], np.float32)  # of each row: how much its tokens depend on those before
MIXING = np.random.default_rng(0).standard_normal((2, TOKENS, TOKENS)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((len(COUPLING), TOKENS, CHANNELS)).astype(np.float32)
BEGIN = np.random.default_rng(2).standard_normal((len(COUPLING), CHANNELS)).astype(np.float32)


def token_by_token(row: int) -> np.ndarray:
    """h (S, D) in float64; `seen` is the token before each."""
    seen, h = np.zeros((TOKENS, CHANNELS)), np.zeros((TOKENS, CHANNELS))
    for i in range(TOKENS):
        seen[i] = h[i - 1] if i else BEGIN[row]
        mean, log_scale = (COUPLING[row] * np.tanh(mix[i, : i + 1] @ seen[: i + 1]) for mix in MIXING)
        h[i] = mean + np.exp(log_scale) * NOISE[row, i]
    return h


@functools.cache
def solved(method: Jacobi, rows: tuple[int, ...] = tuple(range(len(COUPLING)))):
    rows = np.array(rows)
    coupling = COUPLING[rows, None, None]

    def predict(new, first, seen):
        c = new.shape[1]
        seen = jax.lax.dynamic_update_slice_in_dim(seen, new, first, axis=1)
        at = first + jnp.arange(c)
        visible = jnp.arange(TOKENS) <= at[:, None]
        mean, log_scale = (coupling * jnp.tanh(jnp.where(visible, mix[at], 0) @ seen) for mix in jnp.asarray(MIXING))
        return mean, jnp.exp(log_scale), seen

    run = jax.jit(lambda z, begin: solve(predict, z, begin, jnp.full(z.shape, 9.0), method))
    return tuple(map(np.asarray, run(NOISE[rows], BEGIN[rows])))


def test_token_by_token():
    h, passes = solved(SEQUENTIAL)
    np.testing.assert_allclose(h, [token_by_token(row) for row in range(len(COUPLING))], atol=1e-5)
    assert passes.shape == (len(COUPLING), TOKENS) and (passes == 1).all()


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("chunk", [2, 3, TOKENS, TOKENS + 1])
def test_exact_after_as_many_passes_as_tokens(chunk, guess):
    """With tolerance 0 every guess gives the exact result, also in a shorter last chunk."""
    h, passes = solved(Jacobi(chunk, 0.0, guess))
    np.testing.assert_allclose(h, solved(SEQUENTIAL)[0], atol=1e-5)
    sizes = [min(chunk, TOKENS - i) for i in range(0, TOKENS, chunk)]
    assert passes.shape == (len(COUPLING), len(sizes)) and (passes <= sizes).all()
    assert (passes[3] >= np.minimum(sizes, 2)).all()  # the coupled row needs more than one


def test_stops_within_the_tolerance():
    loose, tight = (solved(Jacobi(TOKENS, tolerance)) for tolerance in (1e-2, 1e-5))
    exact = solved(SEQUENTIAL)[0]
    assert (loose[1] <= tight[1]).all() and loose[1].sum() < tight[1].sum() < TOKENS * len(COUPLING)
    for (h, _), tolerance in ((loose, 1e-2), (tight, 1e-5)):
        assert (np.mean((h - exact) ** 2, (1, 2)) <= tolerance * np.mean(exact**2, (1, 2))).all()
    assert np.abs(loose[0] - exact).max() > 1e-3


@pytest.mark.parametrize("chunk", [3, TOKENS])
def test_a_row_does_not_depend_on_the_others(chunk):
    """Rows that converge early equal the same rows alone, and so do their later chunks."""
    method = Jacobi(chunk, 0.05)
    h, passes = solved(method)
    assert len(set(passes[:, 0])) > 2 and np.abs(h - solved(SEQUENTIAL)[0]).max() > 1e-3
    for row in range(len(COUPLING)):
        alone, alone_passes = solved(method, (row,))
        np.testing.assert_allclose(h[row], alone[0], atol=1e-6)
        np.testing.assert_array_equal(passes[row], alone_passes[0])


@pytest.mark.parametrize(
    "wrong", [dict(chunk=0), dict(chunk=2.0), dict(chunk=2, tolerance=-1), dict(chunk=2, guess="")]
)
def test_a_solver_that_means_nothing(wrong):
    with pytest.raises(ValueError):
        Jacobi(**wrong)


# The flow.

GRID, D, B = (2, 3), 2, 2
N = GRID[0] * GRID[1]
PLAIN = TransformerConfig(layers=2, width=16, heads=1, head_dim=20, mlp_hidden=16)  # pairs for row, column and text
BLOCKS = {
    "shift, classes, flip": FlowBlockConfig(
        GRID, D, PLAIN, flip=True, start="shift", scale="exp", positions="learned", classes=3
    ),
    "token, prefix": FlowBlockConfig(
        GRID, D, PLAIN, soft_clip=4.0, rotary_text=True, final_norm=True, prefix_channels=3
    ),
}
GUIDES = {
    "none": None,
    "mixing": guidance.gaussian_mixing(1.5),
    "annealed": guidance.linear(1.5, N, annealed=True),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def contexts(cfg: FlowBlockConfig) -> tuple[Context, Context]:
    """The conditional and the unconditional context of the guided tests."""
    if cfg.classes:
        return Context(np.array([0, 2])), Context(np.array([-1, -1]))
    return tuple(Context(prefix=normal(seed, B, 4, cfg.prefix_channels)) for seed in (10, 11))


def random_params(module, *inputs) -> dict:
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * normal(i, *x.shape)) for i, x in enumerate(leaves)])


@functools.cache
def block_params(name: str) -> dict:
    return random_params(FlowBlock(BLOCKS[name]), normal(0, B, N, D), contexts(BLOCKS[name])[0])


@functools.cache
def inverted(name: str, guide: str, solver: Jacobi, temperature: float = 1.0):
    """The inverse h and its passes."""
    block, params = FlowBlock(BLOCKS[name]), block_params(name)

    @jax.jit
    def run(z):
        arguments = z, *contexts(block.cfg), GUIDES[guide], temperature, solver
        return block.apply(params, *arguments, method=FlowBlock.inverse, mutable="inversion")

    h, sown = run(normal(1, B, N, D))
    return np.asarray(h), np.asarray(sown["inversion"]["passes"])


@functools.cache
def forward_of(name: str):
    return jax.jit(functools.partial(FlowBlock(BLOCKS[name]).apply, block_params(name)))


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("name", BLOCKS)
def test_exact_inverse_of_a_block(name, guide):
    """h equals mean + scale z with the guided Gaussians of a full forward pass over h; a chunk of 4 leaves a shorter
    one.
    """
    block, z = FlowBlock(BLOCKS[name]), normal(1, B, N, D)
    h, passes = inverted(name, guide, Jacobi(4, 0.0))
    forward = forward_of(name)
    first = int(block.cfg.start == "shift")  # that token is not predicted

    def gaussians(context):
        made, logdet = forward(h, context)
        made, logdet, mine = ((np.flip(a, 1) if block.cfg.flip else a)[:, first:] for a in (made, logdet, h))
        return mine - made / np.exp(logdet), np.exp(-logdet)

    conditional, unconditional = (gaussians(c) for c in contexts(block.cfg))
    index = np.arange(N - first)[:, None]
    mean, scale = GUIDES[guide](conditional, unconditional, index) if GUIDES[guide] else conditional
    mine, noise = (np.flip(a, 1) if block.cfg.flip else a for a in (h, z))
    np.testing.assert_allclose(mine[:, first:], mean + scale * noise[:, first:], atol=1e-4)
    np.testing.assert_array_equal(mine[:, :first], noise[:, :first])
    assert passes.shape == (B, 2) and (passes <= [4, N - first - 4]).all() and passes.max() > 1
    assert np.abs(h - inverted(name, "none" if GUIDES[guide] else "mixing", Jacobi(4, 0.0))[0]).max() > 1e-2


@pytest.mark.parametrize("guide, temperature", [("none", 1.0), ("mixing", 2.0)])
def test_equal_to_sequential(guide, temperature):
    name = "shift, classes, flip"
    h, passes = inverted(name, guide, SEQUENTIAL, temperature)
    assert (passes == 1).all()
    for solver, atol in ((Jacobi(N, 0.0), 1e-5), (Jacobi(3, 1e-3), 0.2)):
        fast, fast_passes = inverted(name, guide, solver, temperature)
        np.testing.assert_allclose(fast, h, atol=atol)
        assert np.mean((fast - h) ** 2) <= max(solver.tolerance, 1e-9) * np.mean(h**2)
        assert fast_passes.max() > 1


def chain() -> tuple[Flow, dict, jax.Array, Conditions]:
    """Two blocks over two tokens: one without a condition, and a guided, flipped one."""
    deep = replace(BLOCKS["token, prefix"], grid=(1, 2), flip=True, transformer=replace(PLAIN, layers=1))
    flow = Flow((replace(deep, flip=False, prefix_channels=0), deep))
    z, (here, there) = normal(3, B, 2, D), contexts(deep)
    return flow, random_params(flow, z, here)["params"], z, Conditions(here, there, GUIDES["mixing"], 2.0)


def test_a_schedule_has_a_solver_for_each_block():
    flow, params, z, on = chain()

    @functools.partial(jax.jit, static_argnums=0)
    def invert(schedule):
        arguments = z, on.context, on.unconditional, on.guide, on.temperature, schedule
        return flow.apply({"params": params}, *arguments, method=Flow.inverse, mutable="inversion")

    def run(schedule):
        h, sown = invert(schedule)
        return h, [sown["inversion"][f"block_{i}"]["passes"].shape for i in range(2)]

    h, chunks = run(None)
    fast, fast_chunks = run((Jacobi(2, 0.0), SEQUENTIAL))
    np.testing.assert_allclose(fast, h, atol=1e-5)
    assert chunks == [(B, 2), (B, 2)] and fast_chunks == [(B, 1), (B, 2)]
    with pytest.raises(ValueError):
        run((SEQUENTIAL,))


# Calibration.


def test_calibrate():
    flow, params, z, on = chain()
    measured = calibrate(flow, params, z, 0.0, on)
    assert [[m.solver for m in rows] for rows in measured] == 2 * [list(candidates(2, 0.0))]
    for rows in measured:
        assert rows[0].passes == 2 and rows[0].error == 0
        for m in rows[1:]:
            assert m.error < 1e-9 and 0 < m.seconds and m.passes == 2


def test_candidates():
    found = list(candidates(6, 0.1))
    assert found[0] == Jacobi(1, 0.1) and len(set(found)) == len(found) == 1 + 3 * len(GUESSES)
    assert {s.chunk for s in found} == {1, 2, 4, 6} and {s.guess for s in found[1:]} == set(GUESSES)
    assert [s.chunk for s in candidates(1, 0.1)] == [1]


def test_the_fastest_that_is_right():
    first = Measurement(SEQUENTIAL, 4, 2.0, 0.0)
    right, wrong = Measurement(Jacobi(2), 2, 1.0, 1e-4), Measurement(Jacobi(4), 1, 0.5, 1e-2)
    slow, broken = replace(right, seconds=3.0), replace(wrong, error=float("nan"))
    assert fastest([first, right, wrong, broken], 1e-3) == right
    assert fastest([first, right, wrong], 1e-1) == wrong
    assert fastest([first, slow, wrong], 1e-3) == fastest([first, broken], 1.0) == first


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    config = configs.load(QUICK).unlock()
    config.model, config.max_positions = asdict(tiny.CONFIG), 64
    saved = CheckpointDirectory(folder)
    saved.create(config, tiny.CODEC, tiny.tokenizer())
    frozen, trainable = split(tiny.params())
    saved.frozen.save(frozen)
    saved.steps.save(3, {"params": trainable}, {"stage": "joint", "stage_step": 3})
    saved.steps.close()
    return folder


@pytest.mark.slow
def test_calibrate_a_checkpoint(checkpoint, capsys, monkeypatch):
    """The command writes the solvers that the sampler then uses."""
    monkeypatch.setattr(calibration, "candidates", lambda _, tolerance: [Jacobi(1, tolerance), Jacobi(4, tolerance)])
    assert Sampler.restore(checkpoint).schedule is None
    command = ["calibrate", "--checkpoint", str(checkpoint), "--tolerance", "1e-4", "--batch", "3", "--tensor", "2"]
    assert cli.main([*command, "--prompt", "draw", "--prompt", "an eight"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((checkpoint / "inversion.json").read_text())
    assert report["step"] == 3 and report["batch"] == 3 and report["error"] < 1e-3 and len(report["blocks"]) == 3
    assert report["sequential_seconds"] > 0 and report["seconds"] > 0 and "inversion.json" in printed
    for block in report["blocks"]:
        assert {"solver", "passes", "seconds", "error"} <= set(block) and block["error"] <= 1e-4
        assert [c["solver"]["chunk"] for c in block["candidates"]] == [1, 4]
    sampler = Sampler.restore(checkpoint)
    assert capsys.readouterr().err == ""
    assert (*sampler.schedule, sampler.deep) == tuple(Jacobi(**block["solver"]) for block in report["blocks"])

    # By hand, solvers so loose that one can see they are used, measured at another step.
    options = SampleOptions(guidance=1.0, max_tokens=tiny.CONFIG.tokens + 1, image_first=True)
    session = sampler.session(replace(options, jacobi=1), [0])
    session.write()
    u = session.rows.u[:, 1 : tiny.CONFIG.tokens + 1]
    exact = sampler.decode(u, calibrated=False)
    for block in report["blocks"]:
        block["solver"] = asdict(Jacobi(4, 10.0))
    (checkpoint / "inversion.json").write_text(json.dumps(report | {"step": 2}))
    restored = Sampler.restore(checkpoint)
    assert "was measured at step 2, not 3; calibrate again" in capsys.readouterr().err
    assert not np.allclose(restored.decode(u), exact, atol=1e-4)
    session = restored.session(options, [0])
    session.write()
    assert not np.allclose(session.rows.u[:, 1 : tiny.CONFIG.tokens + 1], u, atol=1e-4)


@pytest.mark.slow
def test_what_is_measured_of_the_deep_flow():
    """With guidance and prompts of two lengths: error and passes of a loose solver, against images drawn separately."""
    sampler = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=64)
    N, prompts, tolerance = tiny.CONFIG.tokens, [[Text("draw an eight")], [Text("two")]], 0.3
    measured, exact = calibrate_deep(sampler, prompts, 1.5, tolerance, batch=3)
    assert [m.solver for m in measured] == [Jacobi(c, tolerance) for c in (1, 2, 4, N)]
    assert measured[0].error == 0 and measured[0].passes == N
    options = SampleOptions(guidance=1.5, max_tokens=N + 1, image_first=True, tolerance=tolerance)
    drawn = {}
    for chunk in (1, N):
        session = sampler.session(replace(options, jacobi=chunk), range(3))
        session.read([prompts[0], prompts[1], prompts[0]])
        session.write()
        drawn[chunk] = np.asarray(session.rows.u)[:3, 1 : N + 1]
    np.testing.assert_allclose(exact, drawn[1], atol=1e-5)
    assert (
        measured[-1].error == pytest.approx(calibration.relative_error(drawn[N], drawn[1]), rel=1e-3)
        and measured[-1].error > 1e-4
    )
    assert 1 < measured[-1].passes < N and min(m.seconds for m in measured) > 0


@pytest.mark.parametrize(
    "content, saying",
    [
        (b"", "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[1, 2]", "damaged"),
        (b"{}", "blocks"),
        (b'{"blocks": 2}', "damaged"),
        (b'{"blocks": [3, 4]}', "damaged"),
        (b'{"blocks": [{"solver": {"chunk": 2, "colour": 1}}]}', "colour"),
        (b'{"blocks": [{"solver": {"chunk": 0}}]}', "at least one token"),
        (b'{"blocks": [{"solver": {"chunk": 2, "tolerance": "loose"}}]}', "damaged"),
        (b'{"blocks": [{"solver": {"chunk": 2, "guess": ["noise"]}}]}', "damaged"),
        (b'{"blocks": [{"solver": {"chunk": 2}}]}', "1 blocks, not 2"),
    ],
)
def test_a_damaged_inversion_json(content, saying, tmp_path):
    (tmp_path / "inversion.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=saying) as caught:
        inversion.read(tmp_path, 2)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    (tmp_path / "inversion.json").write_text(json.dumps({"blocks": [{"solver": asdict(Jacobi(2, 0.1, "zeros"))}] * 2}))
    solver = Jacobi(2, 0.1, "zeros")
    assert inversion.read(tmp_path, 2) == Inversion((solver,), solver)


def test_jacobi_1_is_token_by_token_in_both_flows():
    """`jacobi` 1 is exact, however rough the checkpoint's calibrated solvers are."""
    solver = Jacobi(tiny.CONFIG.tokens, 1e9)
    exact, rough = (
        Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, inversion=solvers)
        for solvers in (Inversion(), Inversion((solver,) * 2, solver))
    )
    options = SampleOptions(max_tokens=tiny.CONFIG.tokens + 2, image_first=True, jacobi=1)
    images = [
        s.generate([[Text("draw")]], replace(options, jacobi=j))[0][0].pixels
        for s, j in ((exact, 1), (rough, 1), (rough, 0))
    ]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 1e-2


def test_bad_arguments(capsys):
    for wrong in (["--batch", "0"], ["--tolerance", "-1"], ["--tolerance", "nan"], []):
        assert cli.main(["calibrate", "--checkpoint", "." if wrong else "missing", *wrong]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and (wrong[0] in said if wrong else "no checkpoint directory" in said)
