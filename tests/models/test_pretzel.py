"""The whole model: causality, packed documents, closed skips, and decoding through the caches."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from starflow2_jax import sequence
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.pipeline import collate
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.pretzel import Caches, Output, Pretzel, for_sampling, init_params
from starflow2_jax.models.qwen import Qwen
from starflow2_jax.sequence import Sequence, Shape, Step

CLOSE = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@partial(jax.jit, static_argnames=("skips", "deep"))
def run(inputs, params, caches=None, skips=True, deep=True) -> Output:
    return tiny.MODEL.apply({"params": params}, inputs, caches, skips=skips, deep=deep)


def empty(rows: int, capacity: int) -> Caches:
    return tiny.MODEL.apply({"params": tiny.params()}, rows, capacity, method=Pretzel.empty_caches)


def said(output: Output) -> np.ndarray:
    """Text states, means and scales of all positions, side by side: (B, S, channels)."""
    return np.concatenate([output.text, output.mean, output.scale], axis=-1)


def u_at_positions(batch: Sequence, output: Output) -> np.ndarray:
    """(B, S, D): u where the positions are FLOW, else 0."""
    u = np.asarray(output.u).reshape(len(batch.tokens), -1, tiny.CHANNELS)
    here = np.take_along_axis(u, np.asarray(batch.image_token_index)[..., None], axis=1)
    return np.where((batch.modality == sequence.FLOW)[..., None], here, 0)


@pytest.fixture(scope="module")
def batch():
    return tiny.packed()


@pytest.fixture(scope="module")
def full(batch):
    return run(batch, tiny.params())


def test_no_position_sees_a_later_token_or_u():
    """In row i of a batch position i is changed: outputs before i stay, those at i change, in text, mean and scale."""
    batch = tiny.alone(tiny.documents()[1])
    S = int((batch.segments > 0).sum())
    read = run(batch, tiny.params())
    inputs = (batch.tokens, batch.modality, batch.positions, u_at_positions(batch, read))
    plain = Step(*(np.repeat(x[:, :S], S, axis=0) for x in inputs))
    eye, is_flow = np.eye(S, dtype=bool), plain.modality == sequence.FLOW
    changed = plain.replace(
        tokens=np.where(eye & ~is_flow, 7, plain.tokens), u=plain.u + np.where(eye & is_flow, 1.0, 0.0)[..., None]
    )
    before, after = (run(step, tiny.params(), empty(S, S)) for step in (plain, changed))
    CLOSE(said(before)[0], said(read)[0, :S])
    for part in ("text", "mean", "scale"):
        moved = np.abs(np.asarray(getattr(after, part)) - np.asarray(getattr(before, part))).max(-1)
        assert (moved[np.tril(np.ones((S, S), bool), -1)] == 0).all()
        assert (moved[eye] > 1e-4).all(), part
        assert (moved[:-2, S - 1] > 1e-6).all(), part  # and it is still seen at the end


@pytest.mark.parametrize("index", (1, 4))
def test_nothing_before_an_image_sees_it(index):
    """A token of an image may change all of the image's u, since the shallow flow mixes tokens, but nothing before the
    image.
    """
    batch = tiny.alone(tiny.documents()[index])
    base = said(run(batch, tiny.params()))[0]
    images = [(sequence.FLOW, m) for m in range(int(batch.latents[0].any((1, 2)).sum()))]
    images += [(sequence.VIT, i) for i in set(batch.vision.image[0].tolist()) - {0}] if batch.vision else []
    for kind, which in images:
        here = np.flatnonzero(batch.modality[0] == kind)
        if kind == sequence.FLOW:
            noise = np.zeros_like(batch.latents)
            noise[0, which] = np.random.default_rng(0).standard_normal(noise.shape[2:])
            other, first = batch.replace(latents=batch.latents + noise), here[which * 6]
        else:
            noise = (batch.vision.image == which)[..., None] * np.float32(0.7)
            other, first = batch.replace(vision=batch.vision.replace(patches=batch.vision.patches + noise)), here[0]
        moved = np.abs(said(run(other, tiny.params()))[0] - base).max(-1)
        last = np.flatnonzero(batch.segments[0])[-1]
        assert (moved[:first] == 0).all() and (moved[first : last + 1] > 1e-6).all()


def test_packed_documents_do_not_see_each_other(batch, full):
    found = tiny.places(batch)
    assert {index for index, _, _ in found} == set(range(5))
    logdet, u = np.asarray(full.logdet), np.asarray(full.u)
    for index, row, where in found:
        single = tiny.alone(tiny.documents()[index])
        output = run(single, tiny.params())
        CLOSE(said(full)[row, where], said(output)[0, : len(where)], err_msg=f"document {index}")
        flow = [t for t in where if batch.modality[row, t] == sequence.FLOW]
        for k, m in enumerate(sorted({int(s) // 6 for s in np.asarray(batch.image_token_index)[row, flow]})):
            CLOSE(u[row, m], output.u[0, k])
            CLOSE(logdet[row, m], output.logdet[0, k])


def test_closed_skips_leave_the_vlms_own_logits_bit_for_bit(batch):
    """Against `Qwen` alone over the embeddings of a row of text."""
    document = [Text("draw an eight and count from one to four", predict=True)]
    words = tiny.alone(document)
    mask = np.asarray(words.segments[:, :, None] == words.segments[:, None, :]) & np.tril(np.ones((40, 40), bool))

    def alone(m: Qwen):
        return m.logits(m.run(m.embed(words.tokens), words.positions, mask)[0])

    own = jax.jit(lambda p: Qwen(tiny.CONFIG.vlm).apply({"params": p}, method=alone))(tiny.params()["vlm"])
    logits = jax.jit(lambda p, h: tiny.MODEL.apply({"params": p}, h, method=Pretzel.text_logits))
    closed = logits(tiny.params(), run(words, tiny.params(), skips=False).text)
    assert np.array_equal(closed, own)
    zero = tiny.with_zero_skips(tiny.params())
    assert np.array_equal(logits(zero, run(words, zero).text), own)
    opened = logits(tiny.params(), run(words, tiny.params()).text)
    assert np.abs(np.asarray(opened - own)).max() > 1e-3

    with_zero, shut = run(batch, zero), run(batch, tiny.params(), skips=False)
    for part in ("text", "mean", "scale"):
        assert np.array_equal(getattr(with_zero, part), getattr(shut, part))
    assert np.abs(np.asarray(run(batch, tiny.params()).mean - shut.mean)).max() > 1e-3


@pytest.fixture(scope="module")
def fresh() -> dict:
    return jax.jit(lambda: init_params(tiny.MODEL, jax.random.key(0)))()


def test_what_begins_at_zero(fresh):
    """Only the kernels of the skips and of the Gaussian heads start at 0, so Gaussians begin with mean 0 and scale
    1.
    """
    kernels = {path: leaf for path, leaf in flatten_dict(fresh, sep="/").items() if path.endswith("kernel")}
    zero = {path for path, kernel in kernels.items() if not np.asarray(kernel).any()}
    assert zero == {
        "w_vlm/kernel",
        "w_d/kernel",
        "head/kernel",
        "shallow/block_0/proj_out/kernel",
        "shallow/block_1/proj_out/kernel",
    }
    assert set(fresh["w_vlm"]) == set(fresh["w_d"]) == {"kernel"} and not np.asarray(fresh["head"]["bias"]).any()


def test_a_fresh_model_says_what_its_vlm_says(fresh, batch):
    """A fresh Pretzel with open skips gives the VLM's states bit for bit, and its images are standard Gaussians."""
    opened, closed = run(batch, fresh), run(batch, fresh, skips=False)
    assert np.array_equal(opened.text, closed.text) and np.asarray(closed.text).std() > 0.1
    assert not np.asarray(opened.mean).any() and np.allclose(opened.scale, 1, atol=1e-6)
    CLOSE(opened.u, batch.latents)
    CLOSE(opened.logdet, 0)


@pytest.fixture(scope="module")
def stories():
    """Two documents in a row each, with prompts of different length (the second with an image), read in one pass."""
    parts = [
        [Text("count from one"), Text(" two"), Image(tiny.pixels(20), generate=True), Text(" three")],
        [Image(tiny.pixels(21)), Text("flip it left to right, please"), Image(tiny.pixels(22), generate=True)],
    ]
    shape = Shape(2, 32, 2)
    encode = partial(map, tiny.encoder(vision=False))
    whole = collate(list(encode(parts)), shape)
    prompts = [tiny.encoder(vision=False)(p[:k], closed=False) for p, k in zip(parts, (1, 2), strict=True)]
    lengths = np.array([len(p["tokens"]) for p in prompts], np.int32)
    return whole, collate(prompts, Shape(2, int(lengths.max()), 2)), lengths


@pytest.fixture(scope="module")
def decoded(stories):
    """Prefill of the right-padded prompts, rewind, then one position of each row at a time."""
    whole, prompt, lengths = stories
    total = np.asarray((whole.segments > 0).sum(1))
    output = run(prompt, tiny.params(), empty(2, 40))
    caches = output.caches.rewind(jnp.asarray(lengths))
    rows = [[said(output)[b, : lengths[b]]] for b in range(2)]
    u, row = u_at_positions(whole, run(whole, tiny.params())), np.arange(2)
    for i in range(int((total - lengths).max())):
        at = np.minimum(lengths + i, total - 1)
        one = Step(*(np.asarray(a)[row, at][:, None] for a in (whole.tokens, whole.modality, whole.positions, u)))
        output = run(one, tiny.params(), caches)
        assert np.array_equal(output.caches.length, lengths + i + 1)
        caches = output.caches
        for b in row:
            if lengths[b] + i < total[b]:
                rows[b].append(said(output)[b])
    return [np.concatenate(r) for r in rows], caches.rewind(jnp.asarray(total)), total


def test_decoding_step_by_step_equals_one_pass(stories, decoded):
    rows, _, total = decoded
    assert len(set(stories[2].tolist())) == 2 and (total > stories[2] + 6).all()
    full = said(run(stories[0], tiny.params()))
    for b in range(2):
        CLOSE(rows[b], full[b, : total[b]])


def test_caches_after_generating_are_those_after_reading(stories, decoded):
    """A generated position is never read again, so its keys and values must equal those of reading it."""
    _, stepped, total = decoded
    read = run(stories[0], tiny.params(), empty(2, 40)).caches
    for name in ("vlm", "deep"):
        mine, theirs = getattr(stepped, name), getattr(read, name)
        for b in range(2):
            for a, c in zip(mine.keys + mine.values, theirs.keys + theirs.values, strict=True):
                CLOSE(a[b, :, : total[b]], c[b, :, : total[b]])
                assert np.abs(np.asarray(a[b, :, : total[b]])).max() > 0.1
    assert np.array_equal(stepped.length, total) and np.array_equal(stepped.deep.length, total)


def test_layers_with_parameters_of_their_own(stories):
    """The sampler's model, with separate layers, gives the scanned model's outputs from the same numbers."""
    apart = Pretzel(for_sampling(tiny.MODEL.cfg))
    params = separate_layers(tiny.params())
    shapes = jax.tree.map(jnp.shape, init_params(apart, jax.random.key(0)))
    assert shapes == jax.tree.map(jnp.shape, params)
    want = run(stories[0], tiny.params(), empty(2, 40))
    caches = apart.apply({"params": params}, 2, 40, method=Pretzel.empty_caches)
    for held in (None, caches):
        found = jax.jit(lambda b, c: apart.apply({"params": params}, b, c))(stories[0], held)
        for b, length in enumerate((stories[0].segments > 0).sum(axis=1)):
            CLOSE(said(found)[b, :length], said(want)[b, :length])
        CLOSE(found.u, want.u)
        CLOSE(found.logdet, want.logdet)
    jax.tree.map(CLOSE, found.caches, want.caches)


def test_slots_count_through_each_image(batch):
    slot = np.asarray(tiny.MODEL.apply({}, batch, method=Pretzel._slot_in_image))
    for b, t in np.ndindex(*slot.shape):
        here = batch.modality[b, t] == sequence.FLOW
        assert slot[b, t] == (slot[b, t - 1] + 1 if here and batch.modality[b, t - 1] == sequence.FLOW else 0)
    assert slot.max() == 5


def test_decode_inverts_the_shallow_flow(batch, full):
    bound, u = {"params": tiny.params()}, full.u
    x = jax.jit(lambda u: tiny.MODEL.apply(bound, u, method=Pretzel.decode))(u[:, 0])
    np.testing.assert_allclose(x, batch.latents[:, 0], atol=1e-4)
    assert np.abs(np.asarray(u[:, 0]) - batch.latents[:, 0]).max() > 0.1


def test_dropout_acts_where_a_key_is_given_only(batch, full):
    """Dropout acts on both flows, never on the frozen VLM, and the mean over keys is the u without dropout."""
    flow = replace(tiny.FLOW, dropout=0.1)
    model = Pretzel(replace(tiny.CONFIG, shallow=flow, deep=flow))

    @jax.jit
    def under(key, batch):
        return model.apply({"params": tiny.params()}, batch, skips=False, rngs={"dropout": key})

    jax.tree.map(CLOSE, jax.jit(lambda b: model.apply({"params": tiny.params()}, b))(batch), full)
    words = tiny.alone([Text("which digit is this?")])
    a, b = (under(jax.random.key(i), words) for i in (0, 1))
    assert np.array_equal(a.text, b.text) and np.abs(a.mean - b.mean).max() > 0.05
    drawn = np.stack([under(jax.random.key(i), batch).u for i in range(30)])
    assert np.array_equal(drawn[0], under(jax.random.key(0), batch).u)
    assert drawn.std(0).mean() > 0.01 and np.abs(drawn.mean(0) - full.u).mean() < 0.5 * drawn.std(0).mean()
