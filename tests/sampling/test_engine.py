"""The sampler's steps through its caches, against one full pass over the prompt and the answer."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax import sequence
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel.sharding import make_mesh, tree_shardings
from starflow2_jax.sampling import rows, runtime, steps
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import Answer, as_document
from starflow2_jax.sampling.guidance import extrapolate, mix_gaussians
from starflow2_jax.sampling.session import Session
from starflow2_jax.sampling.steps import keep_likely
from starflow2_jax.sequence import Step

N = tiny.CONFIG.tokens
LENGTH = 64  # more than any prompt here and what is written after it
PROMPTS = [
    [Text("draw an eight")],
    [Image(tiny.pixels(1)), Text("read the digit, then draw its mirror image")],
    [Text("add"), Image(tiny.pixels(2)), Text(" and"), Image(tiny.pixels(3))],
]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC)


def reread(sampler: Sampler, features: dict | None, tokens: np.ndarray, u: np.ndarray):
    """One pass, no sampler code, over a prompt's features (none: nothing), <|vision_start|> and what was written.

    Returns mean, scale, logits from <|vision_start|> on.
    """
    ids, (h, w), D = sampler.ids, tiny.GRID, tiny.CHANNELS
    start = 0 if features is None else len(features["tokens"])
    feed = [] if features is None else list(features["tokens"])
    modality = [] if features is None else list(features["modality"])
    places = [] if features is None else list(features["positions"])
    offset = int(max((p.max() for p in places), default=-1)) + 1
    flow_u = np.zeros((start, D), np.float32)
    if start and len(features["latents"]):
        encode = {"params": sampler.params}, jnp.asarray(features["latents"])[None]
        states, _ = sampler.model.apply(*encode, method=Pretzel.trace)
        flow_u[np.array(modality) == sequence.FLOW] = np.asarray(states[-1]).reshape(-1, D)
    inside = 0
    for token, value in [(ids.vision_start, None), *zip(tokens, u, strict=True)]:
        if token == -2:
            break
        image = token == -1
        feed.append(ids.image if image else token)
        modality.append(sequence.FLOW if image else sequence.TEXT)
        places.append(offset + (np.array([0, inside // w, inside % w]) if image else np.zeros(3, int)))
        flow_u = np.concatenate([flow_u, value[None] if image else np.zeros((1, D), np.float32)])
        inside = (inside + 1) % N if image else 0
        offset += (max(h, w) if inside == 0 else 0) if image else 1
    padding = LENGTH - len(feed)  # behind all that counts, so that every row runs one compiled program
    whole = (np.pad(x, [(0, padding), *[(0, 0)] * (np.ndim(x) - 1)])[None] for x in (feed, modality, places, flow_u))
    return tuple(np.array(a)[0, start : len(feed)] for a in full_pass(sampler.model, sampler.params, Step(*whole)))


@partial(jax.jit, static_argnums=0)
def full_pass(model: Pretzel, params: dict, step: Step):
    caches = model.apply({"params": params}, 1, LENGTH, method=Pretzel.empty_caches)
    output = model.apply({"params": params}, step, caches)
    return output.mean, output.scale, model.apply({"params": params}, output.text, method=Pretzel.text_logits)


def written(sampler: Sampler, prompts, options: SampleOptions, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Session]:
    """Tokens (rows, T), u (rows, T, D) and the session that wrote them."""
    session = sampler.session(options, seed + np.arange(len(prompts)))
    session.read(prompts)
    session.write()
    most = options.max_tokens
    return (
        np.asarray(session.rows.tokens)[: len(prompts), :most],
        np.asarray(session.rows.u)[: len(prompts), :most],
        session,
    )


def features(sampler: Sampler, prompt) -> dict | None:
    return sampler.encoder(prompt, closed=False) if prompt else None


def noise_of(seed: int, first: int, count: int) -> np.ndarray:
    draws = [jax.random.fold_in(jax.random.key(seed), i) for i in range(first, first + count)]
    return np.stack([jax.random.normal(key, (tiny.CHANNELS,)) for key in draws])


GUIDED = {
    "none": {},
    "annealed": dict(guidance=1.5, annealed=True),
    "linear": dict(guidance=0.7, linear=True),
    "two weights": dict(guidance=1.5, image_guidance=0.8),
}


@pytest.mark.parametrize("kind, jacobi", [*((kind, 1) for kind in GUIDED), ("two weights", 4)])
def test_writes_what_one_full_pass_says(sampler, kind, jacobi):
    guided = GUIDED[kind]
    options = SampleOptions(
        temperature=0, image_temperature=0.8, max_tokens=2 * N, image_first=True, jacobi=jacobi, tolerance=0, **guided
    )
    tokens, u, _ = written(sampler, PROMPTS, options, seed=3)
    start, ids = 1, sampler.ids
    assert (tokens[:, 0] == ids.vision_start).all() and (tokens[:, 1 : N + 1] == -1).all()
    assert (tokens[:, N + 1] == ids.vision_end).all()
    for row, prompt in enumerate(PROMPTS):
        given = tokens[row, start:], u[row, start:]
        image = tokens[row, start : N + 1], u[row, start : N + 1]
        mean, scale, logits = reread(sampler, features(sampler, prompt), *given)
        mean, scale = mean[:N], scale[:N]
        weight = options.guidance * ((np.arange(N) + 1) / (N - 1) if options.annealed else np.ones(N))[:, None]
        rule = extrapolate if options.linear else mix_gaussians
        if kind == "two weights":  # first against the same without its text, then against nothing
            seen = reread(sampler, features(sampler, [p for p in prompt if isinstance(p, Image)]), *image)
            mean, scale = rule((mean, scale), (seen[0][:N], seen[1][:N]), weight)
            weight = options.image_guidance
        if guided:
            bare = reread(sampler, None, *image)
            mean, scale = rule((mean, scale), (bare[0][:N], bare[1][:N]), weight)
        expected = mean + 0.8 * scale * noise_of(3 + row, start, N)
        np.testing.assert_allclose(image[1], expected, rtol=1e-3, atol=1e-3)
        logits[:, [ids.image, ids.vision_end, ids.pad]] = -np.inf
        for token, predicted in zip(tokens[row, N + 2 :], logits[N + 1 :], strict=False):
            if token >= 0:
                assert predicted[token] >= predicted.max() - 1e-3


def test_what_was_written_becomes_a_document(sampler):
    """An image is the decoding of its u, text follows it, and an image that max_tokens cut off is left out."""
    ids, T = sampler.ids, 2 * N + 5
    tokens = np.full((1, T), -2)
    tokens[0, :1] = ids.vision_start
    tokens[0, 1 : N + 1] = -1
    tokens[0, N + 1 : N + 3] = ids.vision_end, sampler.tokenizer.encode(" nine")[0]
    tokens[0, N + 3] = -1
    latents = tiny.CODEC.encode(tiny.pixels(5)[None]).reshape(1, 1, N, -1)
    (*_, u), _ = sampler.model.apply({"params": sampler.params}, latents, method=Pretzel.trace)
    answer = Answer(0, sampler.tokenizer, N, ids.end, ())
    [pictures] = sampler.pictures(
        jnp.zeros((1, T, tiny.CHANNELS)).at[:, 1 : N + 1].set(u[:, 0]), [answer.whole(tokens[0])]
    )
    image, text = as_document(answer.read(tokens[0, : N + 4], True, pictures))
    np.testing.assert_allclose(image.pixels, tiny.pixels(5), atol=1e-3)
    assert text == Text(" nine", predict=True)


@pytest.mark.parametrize("jacobi", [1, 4])
def test_a_row_depends_on_nothing_else_in_the_batch(sampler, jacobi):
    options = SampleOptions(guidance=1.0, max_tokens=N + 4, image_first=True, jacobi=jacobi)
    tokens, u, _ = written(sampler, PROMPTS, options, seed=1)
    for row, prompt in enumerate(PROMPTS):
        alone_tokens, alone_u, _ = written(sampler, [prompt], options, seed=1 + row)
        assert (alone_tokens[0] == tokens[row]).all()
        np.testing.assert_allclose(alone_u[0], u[row], atol=1e-4)
    _, other, _ = written(sampler, PROMPTS[:1], options, seed=9)
    assert np.abs(other[0, 1 : N + 1] - u[0, 1 : N + 1]).max() > 0.1


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)])
def test_a_mesh_gives_the_same(sampler, axes):
    mesh = make_mesh(**axes)
    params = jax.device_put(tiny.params(), tree_shardings(tiny.params(), mesh))
    spread = Sampler(tiny.MODEL, params, tiny.tokenizer(), tiny.CODEC, mesh=mesh)
    options = SampleOptions(guidance=1.0, max_tokens=N + 4, image_first=True)
    (tokens, u, session), (want_tokens, want_u, _) = (written(s, PROMPTS, options, seed=1) for s in (spread, sampler))
    assert (tokens == want_tokens).all()
    np.testing.assert_allclose(u, want_u, atol=1e-4)
    keys = session.rows.caches.deep.keys[-1]
    cut = keys.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"]), keys.shape[1] // mesh.shape["tensor"]
    assert keys.sharding.shard_shape(keys.shape) == (*cut, *keys.shape[2:])


def test_jacobi_is_the_sequential_answer(sampler):
    """With tolerance 0 exact in at most as many passes as tokens, with a larger one close to it in fewer passes.

    Prompts have different lengths, rows begin their images at different times, and last chunks are shorter.
    """
    prompts = [*PROMPTS, PROMPTS[0]]
    options = [SampleOptions(temperature=1.0, guidance=0.5, max_tokens=3 * N, image_first=i % 2 == 0) for i in range(4)]

    def run(**changes):
        session = sampler.session([replace(o, **changes) for o in options], [5, 6, 7, 8])
        session.read(prompts)
        session.write()
        return np.asarray(session.rows.tokens), np.asarray(session.rows.u), np.asarray(session.rows.passes)

    tokens, u, passes = run()
    assert (tokens == -1).any() and len({tuple(t == -1) for t in tokens}) > 1
    for chunk, tolerance, near in ((4, 0, 1e-4), (N, 0, 1e-4), (N, 1e-3, 0.3)):
        same, solved, turns = run(jacobi=chunk, tolerance=tolerance)
        if tolerance == 0:
            assert (same == tokens).all() and (turns <= passes).all()
        else:
            assert turns.sum() < passes.sum()
        first = tokens[0] == -1
        np.testing.assert_allclose(solved[0, first], u[0, first], atol=near)


def test_every_position_is_computed_once(sampler):
    """In every use each position that is read or written runs exactly once: text, image, edit, turns, samples of a
    prompt.
    """
    options = SampleOptions(guidance=1.0, image_guidance=0.5, max_tokens=N + 5, image_first=True)
    session = sampler.session(options, [0, 1, 2])
    session.read(PROMPTS)
    given = np.array([len(sampler.encoder(p, closed=False)["tokens"]) for p in PROMPTS])
    assert (session.computed == given).all()
    for turn in range(2):
        session.write(replace(options, image_first=turn == 0))
        given = given + np.asarray(session.rows.count)
        assert (session.computed == given).all() and (np.asarray(session.rows.caches.length)[::3] == given).all()
        assert (np.asarray(session.rows.caches.deep.length) == np.asarray(session.rows.caches.vlm.length)).all()
        more = [[Text(" and now?")], None, [Image(tiny.pixels(4)), Text("read it")]]
        session.read(more)
        given = given + [len(sampler.encoder(p, closed=False)["tokens"]) if p else 0 for p in more]
        assert (session.computed == given).all()
    forked = session.fork([1, 1, 0], [7, 8, 9])
    assert (forked.computed == given[[1, 1, 0]]).all()
    forked.write(replace(options, image_first=False))
    assert (forked.computed == given[[1, 1, 0]] + np.asarray(forked.rows.count)).all()


def test_what_was_written_is_never_encoded_again(sampler):
    """After a written image, the answer from the caches equals the answer after reading that image as a document."""
    session = sampler.session(SampleOptions(max_tokens=N + 2, image_first=True, image_temperature=0.7), [4])
    session.read(PROMPTS[1:2])
    [[image]] = session.write()
    session.read([[Text(" which digit is this?")]])
    again = sampler.session(SampleOptions(), [4])
    again.read([[*PROMPTS[1], image, Text(" which digit is this?")]])

    def logits(s):
        return np.asarray(sampler.model.apply({"params": sampler.params}, s.rows.text, method=Pretzel.text_logits))

    assert again.computed == session.computed
    np.testing.assert_allclose(logits(session), logits(again), atol=1e-4)
    np.testing.assert_allclose(session.rows.mean, again.rows.mean, atol=1e-4)
    other = sampler.session(SampleOptions(), [4])
    other.read([[*PROMPTS[1], Image(tiny.pixels(6)), Text(" which digit is this?")]])
    assert np.abs(logits(other) - logits(session)).max() > 1e-2


def test_samples_of_one_prompt_share_what_was_read(sampler):
    options = SampleOptions(guidance=1.0, max_tokens=N + 1, image_first=True)
    together = sampler.generate(PROMPTS[:2], options, seed=5, samples=3)
    alone = sampler.generate([p for p in PROMPTS[:2] for _ in range(3)], options, seed=5)
    for [a], [b] in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.pixels, b.pixels, atol=1e-3)
    assert np.abs(together[0][0].pixels - together[1][0].pixels).max() > 0.1


def test_limits_of_a_row(sampler):
    """Each row has its own length, number of images and text; a stop string ends the text in front of it."""
    options = [
        SampleOptions(max_tokens=9, max_images=0),
        SampleOptions(max_tokens=2 * N + 6, image_first=True, max_images=1),
        SampleOptions(max_tokens=1, temperature=0),
    ]
    session = sampler.session(options, [1, 2, 3])
    session.read(PROMPTS)
    session.write()
    tokens, count = np.asarray(session.rows.tokens), np.asarray(session.rows.count)
    assert (count <= [9, 2 * N + 6, 1]).all() and not (tokens[0] == -1).any()
    assert (tokens[1] == sampler.ids.vision_start).sum() == 1
    [answer] = sampler.generate(PROMPTS[:1], SampleOptions(max_tokens=30, max_images=0), seed=3)
    assert len(answer[0].text) > 12
    at = answer[0].text[8:10]
    [cut] = sampler.generate(PROMPTS[:1], SampleOptions(max_tokens=30, max_images=0, stop=("@@", at)), seed=3)
    assert cut[0].text == answer[0].text[: answer[0].text.index(at)]


def test_each_row_has_room_for_its_own(sampler):
    """A long prompt with a short answer and a short one with a long answer, each read in two parts, equal each one
    alone.
    """
    small = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=64)
    prompts = [[Text("draw " * 25)], [Text("draw")]]
    options = [SampleOptions(temperature=0, max_tokens=n, max_images=0) for n in (8, 60)]
    assert len(sampler.encoder(prompts[0], closed=False)["tokens"]) + 60 > 64
    session = small.session(options, [0, 1])
    session.read([prompts[0], None])
    session.read([None, prompts[1]], room=session.to_write)
    for row, answer in enumerate(session.write()):
        assert answer == small.generate(prompts[row : row + 1], options[row])[0]
    with pytest.raises(DocumentError, match="and 64 to generate exceed the 64") as refused:
        small.generate(prompts, [options[0], replace(options[1], max_tokens=64)])
    assert refused.value.index == 1


def test_streaming_comes_to_the_same(sampler):
    options = SampleOptions(guidance=1.0, max_tokens=N + 6, image_first=True)
    session = sampler.session(options, [1])
    session.read(PROMPTS[:1])
    counts = [int(c[0]) for c in session.advance(every=2)]
    assert counts[:3] == [2, 4, 6] and counts[-1] == int(session.rows.count[0])
    tokens, u, _ = written(sampler, PROMPTS[:1], options, seed=1)
    assert (np.asarray(session.rows.tokens)[0, : N + 6] == tokens[0]).all()
    np.testing.assert_allclose(np.asarray(session.rows.u)[0, : N + 6], u[0], atol=1e-5)


def test_a_row_is_put_beside_others(sampler):
    """A new conversation replaces a finished one while another continues; each equals itself alone."""
    options = SampleOptions(guidance=1.0, max_tokens=2 * N, image_first=True)
    both = sampler.session(options, [1, 2])
    both.read(PROMPTS[:2])
    next(both.advance(every=5))
    single = sampler.session(options, [3])
    single.read(PROMPTS[2:])
    next(single.advance(every=1))
    capacity = both.rows.caches.capacity
    both.rows = rows.put(both.rows, 1, rows.with_room(single.rows, capacity))
    for _ in both.go_on():
        pass
    for row, (prompt, seed) in enumerate(((PROMPTS[0], 1), (PROMPTS[2], 3))):
        tokens, u, _ = written(sampler, [prompt], options, seed=seed)
        assert (np.asarray(both.rows.tokens)[row, : 2 * N] == tokens[0]).all()
        np.testing.assert_allclose(np.asarray(both.rows.u)[row, : 2 * N], u[0], atol=1e-4)


@pytest.mark.slow
def test_lengths_share_programs():
    """Many lengths, temperatures, limits and numbers of images need few compiled shapes, and all of them are logged."""
    fresh = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC)
    jax.clear_caches()
    for length in (1, 3, 5, 7):
        options = SampleOptions(temperature=length / 10, max_tokens=length, max_images=0)
        assert fresh.generate([[Text("draw " * length)]], options, seed=-length)
    assert len(fresh.programs) == 2  # one reads, one writes
    for images in range(1, 5):
        options = [SampleOptions(max_tokens=N + 2, max_images=i < images, image_first=i < images) for i in range(4)]
        assert sum(isinstance(p, Image) for d in fresh.generate([[Text("draw")]] * 4, options) for p in d) == images
    assert len(fresh.programs) == 2 + 2 + 3  # for four rows; 1, 2, 4 images at once
    few = fresh.generate([[Text("draw")]] * 3, replace(options[0], max_images=1), rows=4)
    assert len(fresh.programs) == 7 and len(few) == 3
    edit = SampleOptions(max_tokens=1, guidance=1.0, image_guidance=1.0)
    assert fresh.generate([[Image(tiny.pixels(1)), Text("mirror it")]], edit)
    assert len(fresh.programs) == 7 + 3  # a program reads in each of two lanes, the third reads nothing
    assert sum(f._cache_size() for f in (steps.read, steps.write, runtime._decode)) == len(fresh.programs)
    assert fresh.generate([]) == []


def test_few_numbers_of_rows():
    counts = [rows.rounded(n) for n in range(1, 513)]
    assert counts[:8] == list(range(1, 9)) and all(n <= c < 5 / 4 * n for n, c in enumerate(counts, start=1))
    assert len(set(counts)) == 8 + 4 * 6  # four to a doubling


def test_a_row_is_cut_for_itself_alone(sampler, monkeypatch):
    """A row's top-k does not change the tokens of a neighbour without top-k."""
    free = SampleOptions(max_tokens=6, max_images=0)
    [alone] = sampler.generate(PROMPTS[:1], free, seed=1)
    only = sampler.tokenizer.encode("nine")[0]
    jax.clear_caches()
    monkeypatch.setattr(steps, "keep_likely", lambda logits, *_: jnp.full_like(logits, -jnp.inf).at[:, only].set(0))
    both = sampler.generate(PROMPTS[:1] * 2, [free, replace(free, top_k=3)], seed=1)
    jax.clear_caches()
    assert both == [alone, [Text(sampler.tokenizer.decode([only] * 6), predict=True)]]


@pytest.mark.parametrize(
    "top_k, top_p, kept", [(0, 1.0, 5), (2, 1.0, 2), (0, 0.6, 2), (3, 0.8, 2), (1, 1.0, 1), (0, 0.0, 1)]
)
def test_likely_tokens(top_k, top_p, kept):
    logits = jnp.log(jnp.array([[0.1, 0.45, 0.05, 0.3, 0.1001]]))
    left = np.isfinite(keep_likely(logits, jnp.array([top_k]), jnp.array([top_p])))[0]
    assert set(np.flatnonzero(left)) == set(np.argsort(-np.asarray(logits[0]))[:kept])


def test_bad_prompts(sampler):
    small = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=40)
    with pytest.raises(DocumentError, match="shorten the prompt"):
        small.generate([[Text("draw " * 60)]])
    with pytest.raises(DocumentError, match="empty"):
        sampler.generate([[Text("")]])
    with pytest.raises(DocumentError, match="the codec takes 4x6x1"):
        sampler.generate([[Image(tiny.pixels(0, (8, 8)))]])
    with pytest.raises(ValueError, match="must have the same stop"):
        sampler.session([SampleOptions(), SampleOptions(guidance=1.0)], [0, 1])
