"""Scores against Jacobians, log softmax by hand and a flow of known density; inversion and denoising against their
definitions.
"""

import json
import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax import cli, sequence
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.config import loading as configs
from starflow2_jax.data import digits
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.images import write_image
from starflow2_jax.evaluation.digits import held_out_nll
from starflow2_jax.models.pretzel import Pretzel, init_params
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.noise_space import decode, denoise, encode
from starflow2_jax.sampling.scoring import describe, illustrate, rank, score

N, D = tiny.CONFIG.tokens, tiny.CHANNELS
HALF_LN_2PI = 0.9189385332046727


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC)


DOCUMENTS = tiny.documents()
DOCUMENTS[2][0] = Text(" seven plus two", predict=True)  # its first token is the document's, which nothing predicts


@cache
def scores():
    """The scores of DOCUMENTS in one batch, by (document, part)."""
    found = score(Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC), DOCUMENTS)
    return {(i, s.part): s for i, parts in enumerate(found) for s in parts}


@jax.jit
def log_softmax(single):
    output = tiny.MODEL.apply({"params": tiny.params()}, single)
    logits = tiny.MODEL.apply({"params": tiny.params()}, output.text, method=Pretzel.text_logits)
    return jax.nn.log_softmax(logits)[0]


def test_every_part_that_counts_has_a_score():
    parts = {(i, k): p for i, document in enumerate(DOCUMENTS) for k, p in enumerate(document)}
    wanted = {at for at, p in parts.items() if (p.generate if isinstance(p, Image) else p.predict)}
    assert set(scores()) == wanted
    for at, found in scores().items():
        assert len(found.tokens) == N if isinstance(parts[at], Image) else found.dims == 0


def test_an_image_is_scored_by_the_jacobian_of_pixels_to_noise():
    """log N(z; 0, 1) + slogdet of d z / d pixels, codec included, for the image of a document that ends with one."""
    document = DOCUMENTS[1]
    single = tiny.alone(document)
    before = np.flatnonzero(single.modality[0] == sequence.FLOW)[N:] - 1  # of the second image

    def z_of(pixels):
        latents = jnp.asarray(single.latents).at[0, 1].set(tiny.CODEC.encode(pixels[None]).reshape(N, D))
        output = tiny.MODEL.apply({"params": tiny.params()}, single.replace(latents=latents))
        return ((output.u[0, 1] - output.mean[0, before]) / output.scale[0, before]).ravel()

    z, jacobian = jax.jit(lambda x: (z_of(x), jax.jacfwd(z_of)(x)))(document[3].pixels)
    z, jacobian = np.float64(z), np.float64(jacobian).reshape(N * D, N * D)
    expected = -0.5 * (z**2).sum() - N * D * HALF_LN_2PI + np.linalg.slogdet(jacobian)[1]
    found = scores()[1, 3]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-4)
    np.testing.assert_allclose(found.tokens.sum(), found.nats, rtol=1e-5)
    np.testing.assert_allclose(found.nats_per_dim, -expected / (N * D), rtol=1e-4)
    # A level of 8 bits is 2/256 wide: the density times that width is its probability.
    np.testing.assert_allclose(found.bits_per_dim, -(expected / (N * D) + np.log(2 / 256)) / np.log(2), rtol=1e-4)


def test_a_flow_that_does_nothing_is_a_gaussian_of_the_images():
    """With fresh parameters every block's mean is 0 and its scale 1: pixels are N(codec.mean, codec.std^2)."""
    params = init_params(tiny.MODEL, jax.random.key(0))
    [[found]] = score(Sampler(tiny.MODEL, params, tiny.tokenizer(), tiny.CODEC), [illustrate("a", tiny.pixels(8))])
    patches = np.float64(tiny.pixels(8))[..., 0].reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(N, D)
    mean, std = np.array(tiny.CODEC.mean), np.array(tiny.CODEC.std)
    density = np.exp(-((patches - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
    np.testing.assert_allclose(found.tokens, np.log(density).sum(1), rtol=1e-5)

    latents = patches.astype(np.float32).reshape(*tiny.GRID, D)
    plain = Sampler(tiny.MODEL, params, tiny.tokenizer(), LatentCodec(tiny.GRID, D, shift=0.3, scale=2.0))
    [[found]] = score(plain, [illustrate("a", latents)])
    expected = np.mean((patches - 0.3) ** 2 / 8 + HALF_LN_2PI + np.log(2.0))
    np.testing.assert_allclose((found.nats_per_dim, found.bits_per_dim), (expected, expected / np.log(2)), rtol=1e-5)


@pytest.mark.parametrize("index, part", [(1, 2), (2, 0), (3, 1), (4, 4)])
def test_a_text_is_scored_by_log_softmax(sampler, index, part):
    document = DOCUMENTS[index]
    single = tiny.alone(document)
    logp, row = np.asarray(log_softmax(single)), single.tokens[0].tolist()
    ids = tiny.tokenizer().encode(document[part].text) + [sampler.ids.end] * (part == len(document) - 1)
    begin = next(i for i in range(len(row)) if row[i : i + len(ids)] == ids)
    expected = [logp[begin + i - 1, token] for i, token in enumerate(ids) if begin + i]
    assert len(expected) == len(ids) - (index == 2)
    found = scores()[index, part]
    np.testing.assert_allclose(found.tokens, expected, rtol=1e-4)
    np.testing.assert_allclose(found.perplexity, np.prod(np.exp(expected)) ** (-1 / len(expected)), rtol=1e-3)


def test_a_score_depends_on_nothing_else_in_the_batch(sampler):
    document = DOCUMENTS[4]
    [[alone]] = score(sampler, [document])
    np.testing.assert_allclose(alone.tokens, scores()[4, 4].tokens, rtol=1e-4)
    long = [Text("add " * 30), Image(tiny.pixels(9), generate=True)]
    together = score(sampler, [long, *DOCUMENTS[:2], DOCUMENTS[3]], batch_size=3)
    for i, parts in zip((0, 1, 3), together[1:], strict=True):
        for found in parts:
            np.testing.assert_allclose(found.tokens, scores()[i, found.part].tokens, rtol=1e-4, atol=1e-4)


def test_a_mesh_gives_the_same():
    from starflow2_jax.parallel.sharding import make_mesh

    spread = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, mesh=make_mesh(data=2, fsdp=4))
    for i, parts in enumerate(score(spread, DOCUMENTS[:2])):
        for found in parts:
            np.testing.assert_allclose(found.tokens, scores()[i, found.part].tokens, rtol=1e-4, atol=1e-4)


def test_what_is_later_in_the_document_does_not_matter(sampler):
    document = DOCUMENTS[3]
    [[image]] = score(sampler, [document[:1]])
    np.testing.assert_allclose(image.tokens, scores()[3, 0].tokens, rtol=1e-4)


def test_the_evaluations_number_is_the_same_less_the_constant():
    pixels, labels = digits.split("held_out")
    codec = PatchCodec.fit(pixels, 2)
    model = Pretzel(replace(tiny.CONFIG, grid=codec.grid, vlm=replace(tiny.CONFIG.vlm, vision=None)))
    sampler = Sampler(model, init_params(model, jax.random.key(0)), tiny.tokenizer(), codec)
    found = score(sampler, [digits.caption(labels[i], pixels[i], i) for i in range(3)])
    mean = np.mean([image.nats_per_dim for [image] in found])
    np.testing.assert_allclose(held_out_nll(sampler, limit=3, draws=1, noise=0.0), mean - HALF_LN_2PI, rtol=1e-4)


def test_rank_orders_as_the_scores_do(sampler):
    captions, image = ["draw an eight", "three", "read the digit"], tiny.pixels(0)
    [_, *given] = score(sampler, [illustrate(c, image) for c in ["", *captions]])
    [[nothing]] = score(sampler, [[Image(image, generate=True)]])
    gains = {c: parts[0].nats - nothing.nats for c, parts in zip(captions, given, strict=True)}
    ranked = rank(sampler, image, captions)
    assert [c for c, _ in ranked] == sorted(captions, key=gains.get, reverse=True)
    np.testing.assert_allclose([s for _, s in ranked], [gains[c] for c, _ in ranked], atol=1e-3)
    by_text = dict(rank(sampler, image, captions, prior=False, make_document=describe))
    for caption, [text] in zip(captions, score(sampler, [describe(c, image) for c in captions]), strict=True):
        np.testing.assert_allclose(by_text[caption], text.nats, rtol=1e-4)
    with pytest.raises(DocumentError, match="set prior=False"):
        rank(sampler, image, captions, make_document=describe)


def test_what_cannot_be_scored(sampler):
    for nothing in ([Text("draw"), Image(tiny.pixels(0))], [Text(" two", predict=True), Image(tiny.pixels(0))]):
        with pytest.raises(DocumentError, match="document 1: nothing in it counts"):
            score(sampler, [DOCUMENTS[0], nothing])
    small = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=8)
    with pytest.raises(DocumentError, match="document 0: .* exceeds the 8 .*shorten"):
        score(small, DOCUMENTS)
    with pytest.raises(DocumentError, match="2 prompts were given with 1"):
        encode(sampler, [[], []], [tiny.pixels(0)])


PROMPTS = [[Text("draw an eight")], [Image(tiny.pixels(1)), Text("mirror it")], [Text("")]]


def test_an_image_becomes_noise_and_itself_again(sampler):
    images = [tiny.pixels(i) for i in (20, 21, 22)]
    z = encode(sampler, PROMPTS, images)
    assert z.shape == (3, N, D)
    np.testing.assert_allclose(decode(sampler, PROMPTS, z), images, atol=1e-3)
    other = decode(sampler, PROMPTS[::-1], z)
    assert (np.abs(other - images).max(axis=(1, 2, 3)) > 1e-2).tolist() == [True, False, True]
    np.testing.assert_allclose(encode(sampler, PROMPTS[::-1], list(other)), z, atol=2e-3)
    np.testing.assert_allclose(encode(sampler, PROMPTS[2:], images[2:])[0], z[2], atol=1e-3)


def test_the_samplers_noise_is_found_again(sampler):
    options = SampleOptions(temperature=0, image_temperature=1.0, max_tokens=N + 1, image_first=True)
    images = [next(p.pixels for p in d if isinstance(p, Image)) for d in sampler.generate(PROMPTS, options, seed=3)]
    keys = [jax.random.key(3 + row) for row in range(3)]  # draw 0 is <|vision_start|>
    drawn = [[jax.random.normal(jax.random.fold_in(key, 1 + i), (D,)) for i in range(N)] for key in keys]
    np.testing.assert_allclose(encode(sampler, PROMPTS, images), np.array(drawn), atol=2e-3)
    np.testing.assert_allclose(decode(sampler, PROMPTS, np.array(drawn)), images, atol=2e-3)


def test_denoising_follows_the_score(sampler):
    """Each pixel moves by sigma^2 d log p / d pixel, found by finite differences of `score` through the codec."""
    sigma, prompt = 0.2, [Image(tiny.pixels(1)), Text("read the digit")]
    answer = [Text(" nine"), Image(tiny.pixels(2), generate=True), Text(" two"), Image(tiny.pixels(3), generate=True)]
    answers = [answer, answer[:2], answer[:1]]
    cleaned, first, nothing = denoise(sampler, [prompt] * 3, answers, sigma)
    assert cleaned[0] == answer[0] and cleaned[2] == answer[2] and nothing == answer[:1]
    np.testing.assert_allclose(first[1].pixels, cleaned[1].pixels, atol=1e-4)  # what comes later does not matter
    rng = np.random.default_rng(0)
    directions = {k: rng.standard_normal((*tiny.SIZE, 1)).astype(np.float32) for k in (1, 3)}
    moved = score(
        sampler,
        [
            prompt + answer[:k] + [Image(answer[k].pixels + step * direction, generate=True)]
            for k, direction in directions.items()
            for step in (0.01, -0.01)
        ],
    )
    slopes = np.diff([parts[-1].nats for parts in moved])[::2] / -0.02
    for (k, direction), slope in zip(directions.items(), slopes, strict=True):
        found = ((cleaned[k].pixels - answer[k].pixels) * direction).sum()
        np.testing.assert_allclose(found, sigma**2 * slope, rtol=1e-2)


def test_denoising_a_gaussian_is_shrinkage():
    """If noisy pixels are N(mean, std^2), the mean of the clean image given the noisy x is x - sigma^2 (x - mean) /
    std^2.
    """
    params = init_params(tiny.MODEL, jax.random.key(0))
    blank = Sampler(tiny.MODEL, params, tiny.tokenizer(), tiny.CODEC)
    noisy = tiny.pixels(4)
    [[cleaned]] = denoise(blank, [[Text("draw")]], [[Image(noisy, generate=True)]], sigma=0.3)
    mean, std = (np.tile(np.reshape(a, (2, 2)), (2, 3))[..., None] for a in (tiny.CODEC.mean, tiny.CODEC.std))
    np.testing.assert_allclose(cleaned.pixels, noisy - 0.09 * (noisy - mean) / std**2, atol=1e-5)


def test_the_command_line(sampler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sampler, "restore", classmethod(lambda cls, *_: sampler))
    monkeypatch.chdir(tmp_path)
    CheckpointDirectory(tmp_path / "c").create(configs.load("digits_quick"), tiny.CODEC, tiny.tokenizer())
    image = write_image(tmp_path / "scan", tiny.pixels(0))
    (tmp_path / "one.json").write_text(json.dumps([{"text": "draw"}, {"image": "scan.png", "generate": True}]))
    (tmp_path / "two.jsonl").write_text('[{"text": "add"}, {"text": " two", "predict": true}]\n' * 2)
    (tmp_path / "captions.txt").write_text("three\n\ndraw an eight\n")

    assert cli.main(["score", "--checkpoint", "c", "--document", "one.json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["document"], line["part"], len(line["tokens"])) == (0, 1, N)
    assert math.isclose(sum(line["tokens"]), -line["nats_per_dim"] * N * D, rel_tol=1e-4)
    assert cli.main(["score", "--checkpoint", "c", "--document", "two.jsonl", "--out", "found/scores.jsonl"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "found/scores.jsonl").read_text().splitlines()]
    assert [x["document"] for x in lines] == [0, 1] and lines[0]["perplexity"] > 1
    capsys.readouterr()

    for by in ("image", "text"):
        assert (
            cli.main(["rank", "--checkpoint", "c", "--image", str(image), "--captions", "captions.txt", "--by", by])
            == 0
        )
        found = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
        assert {x["caption"] for x in found} == {"three", "draw an eight"} and found[0]["nats"] > found[1]["nats"]

    same = ["invert", "--checkpoint", "c", "--prompt", "draw", "--image", str(image), "--as-prompt", "draw"]
    assert cli.main([*same, "--out", "out/again.png"]) == 0
    assert (tmp_path / "out/again.png").read_bytes() == image.read_bytes()
    assert cli.main(["score", "--checkpoint", "c", "--document", "missing.json"]) == 2
