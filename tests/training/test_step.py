"""The losses against autodiff and float64, and the step against itself on another mesh and in another cut."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from starflow2_jax import sequence
from starflow2_jax.config.schema import OptimizerConfig
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.pipeline import collate
from starflow2_jax.models.flow import Flow
from starflow2_jax.models.layers import Transformer, TransformerConfig
from starflow2_jax.models.likelihood import CHUNK
from starflow2_jax.models.pretzel import Pretzel, split
from starflow2_jax.parallel import sharding
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES
from starflow2_jax.training import losses, program
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.step import Objective, TrainState, finish, make_step, new_state

OPTIMIZER = make_optimizer(
    OptimizerConfig(
        name="adamw",
        learning_rate=1e-2,
        final_fraction=0.1,
        warmup=1,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        clip=1e9,
        moments="float32",
    ),
    10,
)
TEXT_WEIGHT, EMA, NOISE = 0.3, 0.999, 0.1


@cache
def batch():
    return tiny.packed(rows=8, length=48, images=3, patches=16)


@cache
def compiled(name: str, accumulate: int = 1):
    objective = Objective(noise=NOISE, text_weight=TEXT_WEIGHT, text_chunk=20)
    return jax.jit(make_step(tiny.MODEL, STAGES[name], OPTIMIZER, objective, accumulate, EMA))


@cache
def start(name: str) -> tuple[TrainState, dict]:
    """The state that begins a stage, and what the model needs beside it."""
    frozen, trainable = split(tiny.params())
    if name == "pretrain":
        frozen, trainable = trainable, frozen
    return new_state(trainable, STAGES[name], OPTIMIZER, jax.random.key(3)), frozen


@cache
def after(name: str, accumulate: int = 1) -> list[tuple[TrainState, dict]]:
    """State and metrics after each of two steps on one device."""
    (state, frozen), results = start(name), []
    for _ in range(2):
        state, metrics = compiled(name, accumulate)(state, frozen, batch())
        results.append((state, metrics))
    return results


def moments(state: TrainState) -> dict:
    """Adam's first moments: after one step a tenth of the gradient."""
    return next(s for s in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")).mu


def assert_trees_close(a, b, rtol=1e-4):
    """Each leaf to `rtol` of its largest entry."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(
            x, y, rtol=0, atol=rtol * max(np.abs(y).max(), 1e-5), err_msg=sharding.path_name(path)
        )


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_moves_exactly_its_groups(name):
    trains = {
        "pretrain": {"vlm"},
        "text_to_image": {"shallow", "embed_u", "embed_slot", "embed_y", "deep", "deep_norm", "head"},
        "image_to_text": {"adapter"},
        "joint": set(tiny.params()) - {"vlm"},
    }[name]  # written out again, after the paper's table
    before, (state, _) = start(name)[0], after(name)[1]
    assert set(state.params) == set(before.params)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before.params), jax.tree.leaves(state.params), strict=True
    ):
        same = np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert same == (path[0].key not in trains), sharding.path_name(path)
    assert set(moments(state)) == set(state.ema) == trains
    sizes = [x.size for x in jax.tree.leaves(state.optimizer)]
    assert sum(sizes) <= 2 * sum(x.size for g in trains for x in jax.tree.leaves(before.params[g])) + 4


def test_the_average_and_what_a_stage_hands_on():
    states = [start("image_to_text")[0], *(s for s, _ in after("image_to_text"))]
    average = states[0].params["adapter"]
    for i, state in enumerate(states[1:]):
        decay = min(EMA, (1 + i) / (10 + i))
        average = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, average, state.params["adapter"])
    assert_trees_close(states[-1].ema, {"adapter": average}, 1e-6)
    done = finish(states[-1])
    assert_trees_close(done["adapter"], average, 1e-6)
    assert (
        np.abs(np.asarray(done["adapter"]["in"]["kernel"] - states[-1].params["adapter"]["in"]["kernel"])).max() > 1e-4
    )
    assert done["deep"] is states[-1].params["deep"]


def test_four_micro_batches_are_one_batch():
    for (one, m1), (four, m4) in zip(after("joint"), after("joint", 4), strict=True):
        assert_trees_close(moments(four), moments(one))
        assert_trees_close(m4, m1, 1e-5)
    counts = [losses.counts(jax.tree.map(lambda x, i=i: x[i : i + 1], batch())) for i in range(4)]
    assert len({float(c["text"]) for c in counts}) > 1  # of unequal weight: a mean of means would differ


def on_a_mesh(name: str, mesh, steps: int) -> tuple[TrainState, dict]:
    """Take the first steps of a stage on `mesh`: losses and gradients are those of one device. Returns state and
    frozen.
    """
    wanted = after(name)[:steps]  # outside of the mesh
    with jax.set_mesh(mesh):
        state, frozen = (jax.device_put(x, sharding.tree_shardings(x, mesh)) for x in start(name))
        spread = jax.device_put(batch(), sharding.batch_sharding(mesh))
        step = jax.jit(compiled(name).__wrapped__)  # its own cache: the constraints depend on the mesh
        for one, metrics in wanted:
            state, values = step(state, frozen, spread)
            assert_trees_close(moments(state), moments(one))
            assert_trees_close(values, metrics, 1e-5)
    return state, frozen


MESHES = [(8, 1, 1, 1), (1, 2, 2, 2), (2, 1, 4, 1), (1, 4, 2, 1)]  # data, fsdp, sequence, tensor


@pytest.mark.parametrize(
    "name, sizes",
    [("joint", sizes) for sizes in MESHES[:2]]
    + [pytest.param("joint", sizes, marks=pytest.mark.slow) for sizes in MESHES[2:]]
    + [pytest.param(name, (1, 2, 2, 2), marks=pytest.mark.slow) for name in STAGES if name != "joint"],
)
def test_a_mesh_equals_one_device(name, sizes):
    on_a_mesh(name, sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True))), steps=1)


def test_eight_devices_equal_one():
    state, frozen = on_a_mesh("joint", sharding.make_mesh(data=2, fsdp=2, tensor=2), steps=2)
    held = state.params["deep"]["layers"]
    for kernel, shape in (
        (held["mlp"]["up"]["kernel"], (2, 16, 32)),
        (held["mlp"]["down"]["kernel"], (2, 32, 16)),
        (held["attention"]["query"]["kernel"], (2, 16, 1, 16)),
        (frozen["vlm"]["token_embedding"]["embedding"], (208, 16)),
    ):
        assert kernel.addressable_shards[0].data.shape == shape and len(kernel.addressable_shards) == 8


def test_parameters_are_born_on_their_shards():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    shapes = jax.eval_shape(lambda: tiny.init_params(tiny.MODEL, jax.random.key(0)))
    layout = sharding.tree_shardings(shapes, mesh)
    up = layout["vlm"]["stack"]["layers"]["mlp"]["up"]["kernel"]
    assert up.shard_shape((2, 32, 48)) == (2, 8, 24)
    # One key/value head cannot be split over tensor: it stays whole, the rest of the rule holds.
    assert layout["vlm"]["stack"]["layers"]["attention"]["key"]["kernel"].shard_shape((2, 32, 1, 16)) == (2, 8, 1, 16)
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    each = sum(
        int(np.prod(s.shard_shape(x.shape))) for x, s in zip(*map(jax.tree.leaves, (shapes, layout)), strict=True)
    )
    assert each < whole / 4


def test_constraints_land_in_the_compiled_program():
    """All inputs replicated: what a device works on is split by the model's own constraints, or not at all."""
    cfg = TransformerConfig(layers=2, width=32, heads=2, mlp_hidden=80)
    model, x = Transformer(cfg), jnp.ones((4, 8, 32))
    args = (x, jnp.zeros((8, 8)), jnp.tril(jnp.ones((1, 8, 8), bool)))
    params = model.init(jax.random.key(0), *args)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    # rows / (data fsdp), F / tensor; H / tensor. An axis of one may be gone.
    hidden, query = (re.compile(rf"f32\[(1,)?{shape}\]") for shape in ("8,40", "8,1,16"))

    def lower():
        whole = sharding.replicated(mesh)
        return jax.jit(lambda p: model.apply(p, *args)[0], in_shardings=whole).lower(params)

    with jax.set_mesh(mesh):
        lowered = lower()
    text = lowered.compile().as_text()
    assert "sharding_constraint" in lowered.as_text() and '"tensor"' in lowered.as_text()
    assert hidden.search(text) and query.search(text)
    outside = lower()
    assert "sharding_constraint" not in outside.as_text() and not hidden.search(outside.compile().as_text())


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="data=3 fsdp=1 sequence=1 tensor=1 does not fit 8 devices"):
        sharding.make_mesh(data=3)
    assert dict(sharding.make_mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}


def test_what_the_config_says_reaches_the_step(monkeypatch):
    """The noise is in pixels there, and in the codec's latents here."""
    seen = {}

    def noted(model, stage, optimizer, objective, **options):
        seen.update(vars(objective) | options)
        return lambda *state: state

    monkeypatch.setattr(program, "make_step", noted)
    stage = dict(
        text_weight=0.3, accumulate=2, ema=0.7, vlm_length=5, latent_penalty=0.01, optimizer=dict(offload=False)
    )
    config = ConfigDict(dict(noise=0.2, faults={}, stages=dict(joint=stage)))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program.jitted_step(config, tiny.MODEL, STAGES["joint"], OPTIMIZER, tiny.CODEC.std, mesh)
    np.testing.assert_allclose(seen.pop("noise"), 0.2 / np.array(tiny.CODEC.std), rtol=1e-6)
    assert seen.pop("text_chunk") == CHUNK
    assert seen == dict(text_weight=0.3, accumulate=2, ema_decay=0.7, vlm_length=5, latent_penalty=0.01)


def test_image_nll_is_the_jacobians():
    """Against the slogdet of d z / d x of the whole map latents -> z, two images of one document, in float64."""
    document = [Text("add"), Image(tiny.pixels(30), generate=True), Text(" and"), Image(tiny.pixels(31), generate=True)]
    single = tiny.alone(document)
    before = [t - 1 for t in np.flatnonzero(single.modality[0] == sequence.FLOW)]

    def run(latents):
        given = single.replace(latents=latents.reshape(single.latents.shape))
        return model.apply({"params": params}, given), given

    def z_of(latents):
        output, _ = run(latents)
        z = (output.u.reshape(12, 4) - output.mean[0, jnp.array(before)]) / output.scale[0, jnp.array(before)]
        return z.reshape(-1)

    double = {name: replace(getattr(tiny.CONFIG, name), dtype="float64") for name in ("vlm", "shallow", "deep")}
    model, flat = Pretzel(replace(tiny.CONFIG, **double)), np.float64(single.latents).reshape(-1)
    tiny.params()  # made in fp32, as ever
    with jax.enable_x64(True):
        params = jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), tiny.params())
        everything = jax.jit(lambda x: (z_of(x), jax.jacfwd(z_of)(x), losses.image_nll(*run(x))[0]))
        z, jacobian, nll = map(np.asarray, everything(flat))
    assert z.dtype == jacobian.dtype == nll.dtype == np.float64
    z = z.reshape(2, 24)
    assert not jacobian[:24, 24:].any() and np.abs(jacobian[24:, :24]).max() > 1e-3  # the second sees the first
    for m, part in enumerate((slice(0, 24), slice(24, 48))):
        expected = 0.5 * (z[m] ** 2).sum() - np.linalg.slogdet(jacobian[part, part])[1]
        np.testing.assert_allclose(nll[m], expected, rtol=1e-7)  # attention's logits are fp32 all the same
    np.testing.assert_allclose(nll.sum(), 0.5 * (z**2).sum() - np.linalg.slogdet(jacobian)[1], rtol=1e-7)


def test_the_penalty_of_the_intermediate_latents():
    """STARFlow's: c times the sum over the shallow flow's blocks of mean h^2, over the images to be generated; the
    exact likelihood beside it stays what it was."""
    c, (state, frozen) = 0.5, start("text_to_image")
    metrics = {}
    for penalty in (0.0, c):
        objective = Objective(text_weight=TEXT_WEIGHT, latent_penalty=penalty)
        step = make_step(tiny.MODEL, STAGES["text_to_image"], OPTIMIZER, objective, ema_decay=EMA)
        metrics[penalty] = jax.jit(step)(state, frozen, batch())[1]
    flow, wanted = Flow(tiny.CONFIG.shallow_chain), np.asarray(batch().image_weight) > 0
    images = jnp.asarray(batch().latents[wanted])  # (images, N, D)
    states, _ = jax.jit(lambda x: flow.apply({"params": tiny.params()["shallow"]}, x, method=Flow.trace))(images)
    expected = c * sum(np.mean(np.float64(h) ** 2) for h in states)
    assert len(states) == 2 and 0 < wanted.sum() < wanted.size
    np.testing.assert_allclose(metrics[c]["penalty_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics[c]["image_loss"], metrics[0.0]["image_loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics[c]["loss"], metrics[c]["image_loss"] + expected, rtol=1e-5)
    assert "penalty_loss" not in metrics[0.0] and metrics[c]["grad_norm"] != metrics[0.0]["grad_norm"]


@pytest.mark.parametrize("chunk", (1, 5, 7, 12, 256))
def test_cross_entropy_in_chunks_is_the_plain_one(chunk):
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal(s).astype(np.float32) for s in ((3, 12, 8), (11, 8)))
    targets, weights = rng.integers(0, 11, (3, 12)), rng.uniform(0, 1, (3, 12)).astype(np.float32)

    def plain(hidden, head):
        logits = hidden @ head.T
        rows, columns = np.indices(targets.shape)
        return (weights * (jnp.log(jnp.exp(logits).sum(-1)) - logits[rows, columns, targets])).sum()

    chunked = partial(losses.text_cross_entropy, targets=targets, weights=weights, chunk=chunk)
    exact = np.float64(hidden) @ np.float64(head).T
    exact = (
        weights * (np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, targets[..., None], -1)[..., 0])
    ).sum()
    np.testing.assert_allclose(chunked(hidden, head), exact, rtol=1e-5)
    for mine, theirs in zip(
        jax.grad(chunked, (0, 1))(hidden, head), jax.grad(plain, (0, 1))(hidden, head), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", (None, dict(data=1, fsdp=2, tensor=4), dict(data=2, sequence=4)))
def test_no_array_of_all_logits_is_ever_made(mesh):
    """Forward and backward, in the compiled program: words come with a chunk's positions at most; split words stay
    split.
    """
    B, S, E, V, chunk = 4, 64, 16, 1024, 8
    h, head = jnp.ones((B, S, E)), jnp.ones((V, E))
    fixed = dict(targets=jnp.zeros((B, S), jnp.int32), weights=jnp.ones((B, S)), chunk=chunk)

    def text():
        return jax.jit(jax.grad(partial(losses.text_cross_entropy, **fixed), (0, 1))).lower(h, head).compile().as_text()

    if mesh is None:
        program, tensor = text(), 1
    else:
        mesh = sharding.make_mesh(**mesh)
        with jax.set_mesh(mesh):
            program, tensor = text(), mesh.shape["tensor"]
    shapes = [tuple(map(int, dims.split(","))) for dims in set(re.findall(r"[a-z]+[0-9]+\[([0-9,]+)\]", program))]
    logits = [s for s in shapes if V // tensor in s and E not in s and np.prod(s) > 2 * V]
    assert logits and max(np.prod(s) for s in logits) <= B * chunk * V // tensor
    assert not [s for s in shapes if V in s and E not in s and tensor > 1]


def test_losses_are_means_over_what_counts():
    """The step's losses before any update: sums over single documents, divided by what they predict."""
    key = jax.random.fold_in(start("joint")[0].key, 0)
    noisy = batch().latents + NOISE * np.asarray(jax.random.normal(key, batch().latents.shape))
    found = tiny.places(batch())
    documents = [tiny.documents()[index] for index, _, _ in found]
    singles = collate([tiny.encoder()(document) for document in documents], Shape(len(found), 40, 2, 16))
    latents, wanted = np.zeros_like(singles.latents), np.zeros(singles.latents.shape[:2], bool)
    for i, (_, row, where) in enumerate(found):
        flow = where[batch().modality[row, where] == sequence.FLOW]
        for k, m in enumerate(np.unique(np.asarray(batch().image_token_index)[row, flow] // 6)):
            latents[i, k] = noisy[row, m]
        generated = [p.generate for p in documents[i] if isinstance(p, Image) and p.via == "flow"]
        wanted[i, : len(generated)] = generated

    @jax.jit
    def run(singles, params):
        output = tiny.MODEL.apply({"params": params}, singles)
        logits = tiny.MODEL.apply({"params": params}, output.text, method=Pretzel.text_logits)
        return losses.image_nll(output, singles), jax.nn.log_softmax(logits, axis=-1)

    nll, logp = map(np.asarray, run(singles.replace(latents=latents), tiny.params()))
    image = nll[wanted].sum() / (wanted.sum() * 24)
    rows, at = np.nonzero(singles.text_weight[:, 1:])  # documents alone: the first token of each has no predictor
    text = -logp[rows, at, singles.tokens[rows, at + 1]].mean()
    metrics = after("joint")[0][1]
    np.testing.assert_allclose(metrics["image_loss"], image, rtol=1e-5)
    np.testing.assert_allclose(metrics["text_loss"], text, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], image + TEXT_WEIGHT * text, rtol=1e-5)
