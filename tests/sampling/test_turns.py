"""Turns that begin or end in special places: within an image, in rows of different kinds, at stop strings and special
tokens.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import Answer, Picture, Progress, Words, text_runs
from starflow2_jax.sampling.prompts import spoken

N = tiny.CONFIG.tokens
PROMPTS = [[Text("draw an eight")], [Image(tiny.pixels(1)), Text("mirror it")]]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC)


def begun(sampler: Sampler, options, seeds=(1, 2), prompts=PROMPTS):
    session = sampler.session(options, seeds)
    session.read(prompts)
    return session


@pytest.mark.parametrize("jacobi", [1, 4])
def test_an_image_that_was_cut_off_goes_on(sampler, jacobi):
    """One turn, and four turns that end within the image, write the same image; the answer that finishes it holds all
    of it.
    """
    options = SampleOptions(guidance=1.0, max_tokens=N + 5, image_first=True, max_images=1, jacobi=jacobi, tolerance=0)
    uncut = begun(sampler, options).write()
    session = begun(sampler, options)
    for most in (1, 3, 1):  # <|vision_start|>; some of it; one more
        assert session.write(replace(options, max_tokens=most)) == [[], []]
    forked = session.fork([1, 0], [2, 1])
    for turn, wanted in ((session, uncut), (forked, uncut[::-1])):
        for answer, want in zip(turn.write(replace(options, max_tokens=N)), wanted, strict=True):
            np.testing.assert_allclose(answer[0].pixels, want[0].pixels, atol=1e-4)
            assert [p.text for p in answer[1:]] == [p.text for p in want[1:]]
    assert (session.rows.begun == 4).all() and (session.rows.count == N).all()


def test_an_image_that_is_whole_but_for_its_end(sampler):
    """A finished image without its end token belongs to the turn before; the next turn ends it, and may begin a new
    image.
    """
    options = SampleOptions(max_tokens=N + 1, image_first=True)
    session = begun(sampler, options)
    first = session.write()
    second = session.write(replace(options, max_tokens=N + 2))
    tokens = np.asarray(session.rows.tokens)[:, : N + 2]
    assert (tokens[:, :2] == [sampler.ids.vision_end, sampler.ids.vision_start]).all() and (tokens[:, 2:] == -1).all()
    for [a], [b] in zip(first, second, strict=True):
        assert np.abs(a.pixels - b.pixels).max() > 0.1


def test_reading_within_an_image_takes_it_back(sampler):
    """Reading removes the unfinished image of the row that reads, not of others, and of no row if the text is
    refused.
    """
    options = SampleOptions(guidance=1.0, image_guidance=0.5, max_tokens=4, image_first=True)
    session = begun(sampler, options)
    session.write()
    with pytest.raises(DocumentError):
        session.read([[Text("and now?")], [Image(tiny.pixels(0, (8, 8)))]])
    with pytest.raises(DocumentError, match="exceed"):
        session.read([[Text("and now?")], None], room=5000)
    assert (session._open() == 4).all()
    session.read([[Text(" and now?")], [Text("")]])
    anew = begun(sampler, options, prompts=[[*PROMPTS[0], Text(" and now?")], PROMPTS[1]])
    lengths, given = (np.asarray(s.rows.caches.length).reshape(2, 3) for s in (session, anew))
    assert (lengths[0] == given[0]).all() and (lengths[1] == given[1] + 4).all()
    assert (session._open() == [0, 4]).all() and session.rows.offset[0] == anew.rows.offset[0]
    rest = session.write(replace(options, max_tokens=N, image_first=False, max_images=1))
    np.testing.assert_allclose(
        rest[1][0].pixels, begun(sampler, replace(options, max_tokens=N + 1)).write()[1][0].pixels, atol=1e-4
    )


def test_the_end_of_an_image_is_read_by_the_lane_of_images(sampler):
    """Text after an image without its end token: all rows and branches are as if they had read both as a document."""
    options = SampleOptions(guidance=1.0, image_guidance=0.5, max_tokens=N + 1, image_first=True)
    session = begun(sampler, options)
    answers = session.write()
    session.read([[Text(" and now?")]] * 2)
    again = begun(
        sampler, options, prompts=[p + a + [Text(" and now?")] for p, a in zip(PROMPTS, answers, strict=True)]
    )
    lanes = np.arange(6) % 3 < 2  # the bare one begins anew with each image
    for name in ("mean", "offset"):
        a, b = (np.asarray(getattr(s.rows, name))[lanes] for s in (session, again))
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert (np.asarray(session.rows.caches.length)[lanes] == np.asarray(again.rows.caches.length)[lanes]).all()


def test_no_row_waits_for_another_kind(sampler):
    """With Jacobi, each step advances rows that write text and rows within an image."""
    options = [
        SampleOptions(max_tokens=40, max_images=0, jacobi=2),
        SampleOptions(max_tokens=40, image_first=True, jacobi=2),
    ]
    session = begun(sampler, options)
    counts = [c.tolist() for c, _ in zip(session.advance(every=1), range(4), strict=False)]
    assert counts == [[1, 1], [2, 3], [3, 5], [4, 7]]


def test_an_image_that_is_not_allowed(sampler):
    options = SampleOptions(image_first=True, max_images=0)
    with pytest.raises(UserError, match="image_first asks for an image, but max_images is 0"):
        sampler.generate(PROMPTS, options)
    session = begun(sampler, SampleOptions(max_tokens=3, image_first=True))
    session.write()
    with pytest.raises(DocumentError, match="not finished, but max_images is 0"):
        session.write(SampleOptions(max_tokens=3, max_images=0))
    session.write(SampleOptions(max_tokens=3 * N, max_images=1))  # the one that is open is the one
    assert not (np.asarray(session.rows.tokens) == sampler.ids.vision_start).any()


@pytest.mark.parametrize("mark", ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
def test_no_text_begins_or_ends_an_image(sampler, mark):
    with pytest.raises(DocumentError, match="marks an image"):
        sampler.generate([[Text(f"draw{mark}")]], SampleOptions(max_images=0))
    assert sampler.generate([[Text("<|im_start|>user")]], SampleOptions(max_tokens=1, max_images=0))


def test_special_tokens_are_no_words(sampler):
    for said in ("a<|im_end|>", [Text("<|im_"), Text("start|>")], [tiny.pixels(1), "<|endoftext|>"]):
        with pytest.raises(DocumentError, match="a mark of the model's own"):
            spoken(sampler.tokenizer, said)
    assert spoken(sampler.tokenizer, "a <|b|> c") == [Text("a <|b|> c")]
    assert len(spoken(sampler.tokenizer, ["<|im_", tiny.pixels(1), "end|>"])) == 3


BAD = [
    dict(temperature=-0.1),
    dict(image_temperature=float("nan")),
    dict(guidance=-1),
    dict(image_guidance=-1),
    dict(guidance=float("inf")),
    dict(max_tokens=0),
    dict(max_tokens=2.5),
    dict(top_k=-1),
    dict(top_p=1.1),
    dict(top_p=-1),
    dict(max_images=-1),
    dict(jacobi=-1),
    dict(tolerance=-1),
    dict(stop="end"),
    dict(stop=("",)),
    dict(temperature="hot"),
]


def test_seeds_and_numbers_of_any_kind(sampler):
    options = SampleOptions(max_tokens=2, max_images=0)
    one, same = (sampler.generate([[Text("draw")]], options, seed) for seed in (2**64 + 7, 7))
    assert one == same and sampler.generate([[Text("draw")]], replace(options, jacobi=np.int64(1)), -1)


@pytest.mark.parametrize("wrong", BAD)
def test_options_that_mean_nothing(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SampleOptions(**wrong)


def record(sampler, *parts) -> np.ndarray:
    """A row's record made of texts, and of images given by the number of their written tokens."""
    ids = sampler.ids
    tokens = []
    for part in parts:
        if isinstance(part, str):
            tokens += sampler.tokenizer.encode(part)
        else:
            tokens += [ids.vision_start, *[-1] * part] + [ids.vision_end] * (part == N)
    return np.array(tokens)


def test_a_stop_string_does_not_span_an_image(sampler):
    """A stop string within a single run of text is found."""
    session = begun(sampler, SampleOptions(stop=("nine",)))
    tokens = [record(sampler, "ni", N, "ne"), record(sampler, "two", N, "nine")]
    longest = max(map(len, tokens))
    padded = np.array([np.pad(t, (0, longest - len(t)), constant_values=-2) for t in tokens])
    session.rows = session.rows.replace(tokens=jnp.asarray(padded), done=jnp.zeros(2, bool))
    session._stop(("nine",))
    assert session.rows.done.tolist() == [False, True]
    assert [sampler.tokenizer.decode(r, skip_special_tokens=True) for r in text_runs(tokens[0])] == ["ni", "ne"]


def test_words_are_told_before_the_image_that_follows(sampler):
    """Text in one chunk with an image's beginning: the start of a stop string is sent, because the text has ended."""
    answer = Answer(0, sampler.tokenizer, N, sampler.ids.end, ("two x",))
    events = list(answer.read(record(sampler, "a two", 2), False, {}))
    assert "".join(e.text for e in events[:-1]) == "a two" and events[-1] == Progress(0, 0, 2 / N)
    whole = record(sampler, "a two", N, "b")
    [at] = answer.whole(whole)
    events = list(answer.read(whole, False, {at: tiny.pixels(1)}))
    assert [type(e) for e in events] == [Picture, Words] and events[1].text == "b"
