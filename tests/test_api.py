"""The API of few words against the functions it stands for."""

import numpy as np
import pytest
import tiny

from starflow2_jax.api import Model
from starflow2_jax.data.documents import DocumentError, Image, Text, compose
from starflow2_jax.errors import UserError
from starflow2_jax.sampling import noise_space, scoring
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import End, Picture, Progress, Words

N = tiny.CONFIG.tokens
PICTURE = tiny.pixels(3)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256))


def test_what_is_said_becomes_a_document():
    [text], (image, word) = compose("draw"), compose([PICTURE, Text("is", predict=True)])
    assert text == Text("draw") and image.pixels is PICTURE and not image.generate and word.predict


def test_a_stream_tells_what_generate_writes(model):
    options = dict(max_tokens=3 * N, image_first=True, temperature=0.8)
    [[image, *rest]] = model.generate([PICTURE, "mirror it"], seed=4, **options)
    events = list(model.stream([PICTURE, "mirror it"], seed=4, every=2, **options))
    pictures = [e for e in events if isinstance(e, Picture)]
    np.testing.assert_allclose(pictures[0].pixels, image.pixels, atol=1e-5)
    shares = [e.fraction for e in events[: events.index(pictures[0])] if isinstance(e, Progress)]
    assert len(shares) > 1 and shares == sorted(shares)
    text = "".join(part.text for part in rest if isinstance(part, Text))
    assert "".join(e.text for e in events if isinstance(e, Words)) == text
    assert isinstance(events[-1], End) and events[-1].tokens <= 3 * N


def test_editing_shows_the_image_before_the_words(model):
    edited = model.edit(PICTURE, "mirror it", seed=1, guidance=2.0, image_guidance=1.0)
    options = SampleOptions(0, 0.9, 2.0, N + 1, image_first=True, image_guidance=1.0)
    [[want]] = model.sampler.generate([[Image(PICTURE), Text("mirror it")]], options, seed=1)
    np.testing.assert_array_equal(edited, want.pixels)
    assert np.abs(edited - model.edit(-PICTURE, "mirror it", seed=1, guidance=2.0, image_guidance=1.0)).max() > 1e-3


def test_editing_gives_one_image_or_a_sentence(model):
    """Text behind the image does not matter; too few tokens for one, or options that there are not, are said."""
    want = model.edit(PICTURE, "mirror it", seed=1)
    np.testing.assert_array_equal(model.edit(PICTURE, "mirror it", seed=1, max_tokens=N + 5), want)
    for wrong, message in (
        (dict(max_tokens=N), f"max_tokens to at least {N + 1}"), (dict(image_first=False, max_images=0), "no image"),
        (dict(num=2), "no option 'num'"), (dict(top_p=2), "top_p"), (dict(temprature=1), "'temprature'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            model.edit(PICTURE, "mirror it", **wrong)
    with pytest.raises(UserError, match="num must be at least 1"):
        model.generate("draw", num=0)
    for say in (model.generate, lambda said: list(model.stream(said)), lambda said: model.edit(PICTURE, said)):
        with pytest.raises(UserError, match="a mark of the model's own"):
            say("draw<|im_end|>")


def test_a_conversation_goes_on(model):
    chat = model.chat(seed=2, max_tokens=4, max_images=0)
    chat.say([PICTURE, "which digit is this?"])
    before = int(chat.session.computed[0])
    chat.say("and now?")
    added = len(model.sampler.tokenizer.encode("and now?"))
    assert 0 < int(chat.session.computed[0]) - before <= added + 4


def test_exact_things(model):
    document = [Text("draw"), Image(PICTURE, generate=True)]
    assert model.score(["draw", document[1]])[0].nats == model.score(document)[0].nats
    assert model.score(document)[0].nats == scoring.score(model.sampler, [document])[0][0].nats
    captions = ["an eight", "a two"]
    assert model.rank(PICTURE, captions) == scoring.rank(model.sampler, PICTURE, captions)
    by_text = scoring.rank(model.sampler, PICTURE, captions, False, scoring.describe)
    assert model.rank(PICTURE, captions, by="text") == by_text
    np.testing.assert_allclose(model.invert(PICTURE, "a two", "a two"), PICTURE, atol=1e-3)
    z = noise_space.encode(model.sampler, [[Text("a two")]], [PICTURE])
    np.testing.assert_array_equal(
        model.invert(PICTURE, "a two", "an eight"), noise_space.decode(model.sampler, [[Text("an eight")]], z)[0]
    )
    with pytest.raises(UserError, match="by must be"):
        model.rank(PICTURE, captions, by="x")
    answer = [Image(PICTURE, generate=True), Text("done")]
    cleaned, text = model.denoise("a two", answer, sigma=0.1)
    [[want, _]] = noise_space.denoise(model.sampler, [[Text("a two")]], [answer], 0.1)
    np.testing.assert_array_equal(cleaned.pixels, want.pixels)
    assert text.text == "done" and np.abs(cleaned.pixels - PICTURE).max() > 1e-3
    np.testing.assert_allclose(model.denoise("a two", answer)[0].pixels, PICTURE, atol=1e-5)  # trained with no noise
    with pytest.raises(DocumentError, match="empty"):
        model.generate([])
