"""The sampler, step by step through its caches, against one full pass over what it wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax import sequence
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.guidance import mix_gaussians
from starflow2_jax.sequence import Step

N = tiny.CONFIG.tokens
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
        encoded, _ = sampler.model.apply(*encode, method=Pretzel.encode)
        flow_u[np.array(modality) == sequence.FLOW] = np.asarray(encoded).reshape(-1, D)
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
    step = Step(np.array(feed)[None], np.array(modality)[None], np.array(places)[None], flow_u[None])
    caches = sampler.model.apply({"params": sampler.params}, 1, len(feed), method=Pretzel.empty_caches)
    output = sampler.model.apply({"params": sampler.params}, step, caches)
    logits = sampler.model.apply({"params": sampler.params}, output.text, method=Pretzel.text_logits)
    return tuple(np.array(a)[0, start:] for a in (output.mean, output.scale, logits))


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_writes_what_one_full_pass_says(sampler, guidance):
    options = SampleOptions(temperature=0, image_temperature=0.8, guidance=guidance, max_tokens=2 * N, image_first=True)
    tokens, u = sampler.write(PROMPTS, options, seed=3)
    u = np.asarray(u)
    assert (tokens[:, :N] == -1).all() and (tokens[:, N] == sampler.ids.vision_end).all()
    for row, prompt in enumerate(PROMPTS):
        mean, scale, logits = reread(sampler, sampler.encoder(prompt, closed=False), tokens[row], u[row])
        mean, scale = mean[:N], scale[:N]
        if guidance:  # the same image with nothing before it
            bare = reread(sampler, None, tokens[row, :N], u[row, :N])
            mean, scale = mix_gaussians((mean, scale), (bare[0][:N], bare[1][:N]), guidance)
        key = jax.random.fold_in(jax.random.key(3), row)
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (tiny.CHANNELS,)) for i in range(N)])
        np.testing.assert_allclose(u[row, :N], mean + 0.8 * scale * noise, rtol=2e-4, atol=2e-4)
        logits[:, [sampler.ids.image, sampler.ids.vision_end, sampler.ids.pad]] = -np.inf
        for token, predicted in zip(tokens[row, N + 1 :], logits[N + 1 :], strict=False):
            if token >= 0:
                assert predicted[token] >= predicted.max() - 1e-3


def test_what_was_written_becomes_a_document(sampler):
    """An image is the decoding of its u, text follows it, and an image that max_tokens cut off is left out."""
    ids = sampler.ids
    tokens = np.full((1, 2 * N + 5), -2)
    tokens[0, :2] = ids.vision_start, -1
    tokens[0, 1 : N + 1] = -1
    tokens[0, N + 1 : N + 3] = ids.vision_end, sampler.tokenizer.encode(" nine")[0]
    tokens[0, N + 3] = -1  # an image that max_tokens cut off
    latents = tiny.CODEC.encode(tiny.pixels(5)[None]).reshape(1, 1, N, -1)
    u, _ = sampler.model.apply({"params": sampler.params}, latents, method=Pretzel.encode)
    written = jnp.zeros((1, tokens.shape[1], tiny.CHANNELS)).at[:, 1 : N + 1].set(u[:, 0])
    [[image, text]] = sampler._documents(tokens, written)
    np.testing.assert_allclose(image.pixels, tiny.pixels(5), atol=1e-3)
    assert text == Text(" nine", predict=True)


def test_a_row_depends_on_nothing_else_in_the_batch(sampler):
    options = SampleOptions(guidance=1.0, max_tokens=N + 3, image_first=True)
    tokens, u = sampler.write(PROMPTS, options, seed=1)
    for prompts in (PROMPTS[:1], [PROMPTS[0], PROMPTS[2]]):
        some_tokens, some_u = sampler.write(prompts, options, seed=1)
        assert (some_tokens[0] == tokens[0]).all()
        np.testing.assert_allclose(some_u[0], u[0], atol=1e-4)
    _, other = sampler.write(PROMPTS[:1], options, seed=2)
    assert np.abs(np.asarray(other[0, :N] - u[0, :N])).max() > 0.1


def test_a_mesh_gives_the_same(sampler):
    from starflow2_jax.sharding import make_mesh

    spread = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, mesh=make_mesh(data=2, fsdp=4))
    options = SampleOptions(guidance=1.0, max_tokens=N + 3, image_first=True)
    (tokens, u), (want_tokens, want_u) = (s.write(PROMPTS, options, seed=1) for s in (spread, sampler))
    assert (tokens == want_tokens).all()
    np.testing.assert_allclose(u, want_u, atol=1e-4)


def test_bad_prompts(sampler):
    with pytest.raises(DocumentError, match="shorten the prompt"):
        Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=40).write([[Text("draw " * 60)]])
    with pytest.raises(DocumentError, match="empty"):
        sampler.write([[Text("")]])
    with pytest.raises(DocumentError, match="the codec takes 4x6x1"):
        sampler.write([[Image(tiny.pixels(0, (8, 8)))]])
