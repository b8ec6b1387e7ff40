"""What each reading of a document draws: wordings, crops, and what is left out for guidance."""

import io
from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image as Pillow

from starflow2_jax.data import pictures
from starflow2_jax.data.documents import DocumentError, Image, ImageError, StoredImage, Text, Wordings
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.errors import UserError

SIZE = (6, 4)  # of flow images: height, width


def prepared(
    draft, count: int = 1, seed: int = 0, drops: bool = False, words_only: bool = False, latents=False, **options
):
    """`count` readings of a draft."""
    prepare = Preparation(
        SourceConfig(path="digits", **options), ImageReader(1, SIZE, latents), drops=drops, words_only=words_only
    )
    return [prepare(draft, np.random.default_rng((seed, i))) for i in range(count)]


def picture(levels, generate=False, via="flow", kind="PNG", name="a.png") -> StoredImage:
    file = io.BytesIO()
    Pillow.fromarray(np.asarray(levels, np.uint8)).save(file, kind)
    return StoredImage(name, lambda: io.BytesIO(file.getvalue()), generate, via)


def spelled(document) -> str:
    """Letters: texts as they are, images "i", in capitals what is predicted."""
    letters = [(p.text, p.predict) if isinstance(p, Text) else ("i", p.generate) for p in document]
    return "".join(letter.upper() if counts else letter for letter, counts in letters)


def document(spelled: str) -> list:
    return [
        Image(tiny.pixels(k), letter.isupper()) if letter in "iI" else Text(letter.lower(), letter.isupper())
        for k, letter in enumerate(spelled)
    ]


@pytest.mark.parametrize(
    "parts, option, left",
    [
        ("aI", "text_drop", {"I"}),  # a caption
        ("aI", "image_drop", {"aI"}),  # it has no image to leave out
        ("aI", "both_drop", {"I"}),
        ("aiI", "text_drop", {"iI"}),  # an edit
        ("aiI", "image_drop", {"aI"}),
        ("aiI", "both_drop", {"I"}),
        ("aIBI", "text_drop", {"I", "iI"}),  # a story: one of its images, after a part of what came before it
        ("aIBI", "image_drop", {"aIBI", "abI"}),
        ("aIBI", "both_drop", {"I"}),
        ("aiBI", "image_drop", {"abI"}),
        ("iaB", "both_drop", {"iaB"}),  # an answer: no image is generated, and guidance is for images
        ("ab", "text_drop", {"ab"}),
    ],
)
def test_what_is_left_out_for_guidance(parts, option, left):
    none = dict(text_drop=0.0, image_drop=0.0, both_drop=0.0)
    readings = {spelled(d) for d in prepared(document(parts), 40, drops=True, **none | {option: 1.0})}
    assert readings == left
    assert {spelled(d) for d in prepared(document(parts), 40, drops=False, **none | {option: 1.0})} == {parts}
    assert {spelled(d) for d in prepared(document(parts), 40, drops=True, **none)} == {parts}


def test_it_is_left_out_as_often_as_asked():
    seen = Counter(
        spelled(d) for d in prepared(document("aiI"), 4000, drops=True, text_drop=0.1, image_drop=0.2, both_drop=0.3)
    )
    assert {key: round(count / 4000, 1) for key, count in seen.items()} == {"iI": 0.1, "aI": 0.2, "I": 0.3, "aiI": 0.4}
    with pytest.raises(UserError, match="at most 1"):
        SourceConfig(path="digits", text_drop=0.5, image_drop=0.5, both_drop=0.1)


def test_wordings_are_drawn_by_weight():
    draft = [Wordings(("a", "b", "c")), *document("I")]
    for weights, shares in (((), (1 / 3, 1 / 3, 1 / 3)), ((3.0, 1.0), (0.75, 0.25, 0)), ((1, 0, 1, 5), (0.5, 0, 0.5))):
        seen = Counter(d[0].text for d in prepared(draft, 1200, wording_weights=weights))
        np.testing.assert_allclose([seen[w] / 1200 for w in "abc"], shares, atol=0.05)
    own = [Wordings(("a", "b"), predict=True, weights=(0.0, 1.0))]
    assert {(d[0].text, d[0].predict) for d in prepared(own, 20, wording_weights=(1.0, 0.0))} == {("b", True)}
    with pytest.raises(DocumentError, match="all of a text's 2 wordings have a weight of 0"):
        prepared([Wordings(("a", "b"))], wording_weights=(0.0, 0.0, 1.0))


def test_stages_that_train_the_vlm_see_words_and_images_through_its_tower():
    [found] = prepared([Wordings(("a",)), *document("iBI")], words_only=True)
    assert [(p.text, p.predict) for p in found if isinstance(p, Text)] == [("a", True), ("b", True)]
    images = [p for p in found if isinstance(p, Image)]
    assert [(p.via, p.generate, p.start) for p in images] == [("vit", False, False), ("vit", False, True)]


def test_stages_that_train_the_vlm_predict_where_a_stored_picture_begins():
    [found] = prepared([Wordings(("a",)), picture(GRADIENT, generate=True)], words_only=True)
    assert (found[1].via, found[1].generate, found[1].start) == ("vit", False, True)


def test_via_is_the_sources_where_it_says_so():
    [found] = prepared(document("iaI"), via="vit")
    assert [(p.via, p.generate) for p in found if isinstance(p, Image)] == [("vit", False), ("flow", True)]


GRADIENT = np.add.outer(np.arange(24) * 2, np.arange(40) * 5)  # 24 high, 40 wide; each place has a level of its own


def test_pictures_are_scaled_on_the_short_side_and_cropped_in_the_middle():
    [[found]] = prepared([picture(GRADIENT)])
    assert found.pixels.shape == (*SIZE, 1)
    inside = GRADIENT[:, 12:28]  # 16 of 40 columns have the shape 6 x 4
    wanted = inside.reshape(6, 4, 4, 4).mean((1, 3)) * 2 / 255 - 1
    np.testing.assert_allclose(found.pixels[..., 0], wanted, atol=0.03)


def test_pictures_that_must_fit_are_left_as_they_are():
    [[found]] = prepared([picture(GRADIENT)], crop="none")
    assert found.pixels.shape == (24, 40, 1)


def test_images_for_the_vision_tower_are_not_cropped():
    [[found]] = prepared([picture(GRADIENT, via="vit")])
    assert found.pixels.shape == (24, 40, 1)


def test_random_crops_and_mirrors_are_those_of_a_whole_document():
    draft = [picture(GRADIENT), picture(255 - GRADIENT, generate=True)]
    readings = prepared(draft, 40, crop="random", flip=True)
    for before, after in readings:
        np.testing.assert_allclose(before.pixels, -after.pixels, atol=0.02)  # an edit keeps its place
    means = [before.pixels.mean() for before, _ in readings]
    assert np.std(means) > 0.05  # the crops differ
    rising = [before.pixels[0, 0, 0] < before.pixels[0, -1, 0] for before, _ in readings]
    assert 8 < sum(rising) < 32
    again = prepared(draft, 40, crop="random", flip=True)
    assert all(
        np.array_equal(a.pixels, b.pixels)
        for x, y in zip(readings, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_large_jpeg_is_scaled_while_it_is_decoded(monkeypatch):
    smooth = np.add.outer(np.linspace(0, 120, 1600), np.linspace(0, 130, 1600))
    stored = picture(smooth, kind="JPEG")
    whole = Pillow.open(stored.open())
    whole.load()
    decoded, real = [], pictures._opaque
    monkeypatch.setattr(pictures, "_opaque", lambda image: decoded.append(image.size) or real(image))
    [[found]] = prepared([stored])
    assert max(decoded[0]) <= 200 and whole.size == (1600, 1600)
    wanted = np.asarray(whole, np.float32)[:, 267:1333].mean() * 2 / 255 - 1
    assert abs(found.pixels.mean() - wanted) < 0.02


def test_a_large_jpeg_for_the_vision_tower_is_scaled_while_it_is_decoded():
    smooth = picture(np.add.outer(np.linspace(0, 120, 800), np.linspace(0, 130, 1600)), via="vit", kind="JPEG")
    assert ImageReader(1)(smooth).pixels.shape == (800, 1600, 1)
    assert ImageReader(1, seen=64)(smooth).pixels.shape == (
        100,
        200,
        1,
    )  # more than the tower sees, for it scales itself
    [tall] = [picture(np.zeros((1600, 100)), via="vit", kind="JPEG")]
    assert ImageReader(1, seen=64)(tall).pixels.shape == (1600, 100, 1)


def test_latents_are_arrays_and_no_pictures():
    file = io.BytesIO()
    np.save(file, np.ones((2, 3, 5), np.float16))
    stored = StoredImage("a.npy", lambda: io.BytesIO(file.getvalue()), True)
    [[found]] = prepared([stored], latents=True)
    assert found.pixels.shape == (2, 3, 5) and found.pixels.dtype == np.float32 and found.generate
    with pytest.raises(ImageError, match="part 0 .*a.png is a picture, but the codec takes latents"):
        prepared([picture(GRADIENT)], latents=True)
    assert prepared([picture(GRADIENT, via="vit")], latents=True)[0][0].via == "vit"
