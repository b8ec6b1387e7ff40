"""The source scenes: its pictures, its words, its held-out combinations, and edits with exact targets."""

import pickle
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image as Pillow

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.scenes import art
from starflow2_jax.data.scenes.art import COLOURS, TONES, sprites, vocabulary
from starflow2_jax.data.scenes.edits import Edit, in_corner
from starflow2_jax.data.scenes.kinds import CAPTIONS, EDITS, KINDS, Shown
from starflow2_jax.data.scenes.scene import (
    BACKGROUNDS,
    CORNERS,
    RELATIONS,
    Placed,
    Scene,
    held_out,
    related,
    render,
    stands_out,
)
from starflow2_jax.data.scenes.source import NEVER, PARTS, SceneOptions, Scenes
from starflow2_jax.data.scenes.words import countable, describe, name, parse, plan, plural, relation, some
from starflow2_jax.errors import UserError

KIND = pytest.mark.parametrize("kind", KINDS)


def source(kind: str, **options) -> Scenes:
    return Scenes(options=SceneOptions(kind=kind, **options))


def scenes(kind: str, count: int, **options) -> list[Scene]:
    found = source(kind, **options)
    return [part.scene for i in range(count) for part in found.parts(i) if isinstance(part, Shown)]


def sprite(named: str) -> art.Sprite:
    [found] = [each for each in sprites() if name(each) == named]
    return found


def test_the_vocabulary():
    assert Counter(each.kind for each in sprites()) == {"object": 225, "coloured": 32, "person": 240}
    assert len({name(each) for each in sprites()}) == 497 == len({some(each) for each in sprites()})
    assert {each.colour for each in sprites()} == {"", *COLOURS} and {each.tone for each in sprites()} == {"", *TONES}
    small = vocabulary(60)
    assert small == sprites()[: len(small)] and len({each.noun for each in small}) == 60
    assert {each.kind for each in vocabulary(art.FEWEST)} == {"object", "coloured", "person"}


def test_sprites_look_like_their_names():
    """Colours in the sheet are those of the index, so that it was cut in the right order."""
    wanted = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "black": (0, 0, 0), "white": (1, 1, 1)}
    for each in vocabulary(0):
        if each.noun in ("heart", "circle", "square") and each.colour in wanted:
            shown = art.drawn(each, 16)
            mean = shown[..., :3].sum((0, 1)) / shown[..., 3].sum()
            nearest = min(wanted, key=lambda colour: np.linalg.norm(mean - wanted[colour]))
            assert nearest == each.colour
        if each.kind == "person" and each.noun in ("thumbs up", "nose"):
            lighter = [art.drawn(s, 16)[..., :3].sum() for s in sprites() if s.noun == each.noun and s.tone != "yellow"]
            assert lighter == sorted(lighter, reverse=True) and len(lighter) == 5


@pytest.mark.parametrize("size", (32, 64))
def test_a_picture_is_its_sprites_on_its_ground(size):
    """Compared with Pillow's compositing, within two levels of 8 bits."""
    dog, heart = sprite("dog"), sprite("red heart")
    scene = Scene("blue", (Placed(dog, 1, 2, 14), Placed(heart, 15, 16, 16)))
    with Pillow.open(art.FOLDER / "sprites.webp") as file:
        sheet = file.convert("RGBA")
    expected, scale = Pillow.new("RGBA", (size, size), BACKGROUNDS["blue"]), size // 32
    for each in scene.placed:
        y, x = divmod(each.sprite.index, art.COLUMNS)
        cell = sheet.crop((64 * x, 64 * y, 64 * x + 64, 64 * y + 64))
        small = cell.resize((each.side * scale,) * 2, Pillow.Resampling.LANCZOS)
        expected.alpha_composite(small, (each.column * scale, each.row * scale))
    picture = render(scene, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.float32 and abs(picture).max() <= 1
    levels = (picture + 1) * 127.5
    assert np.allclose(levels, np.round(levels), atol=1e-3)
    difference = abs(levels - np.asarray(expected.convert("RGB"), np.float32))
    assert (
        np.percentile(difference, 99) <= 2 and difference.max() < 40
    )  # Pillow's edges differ: it does not premultiply


@KIND
def test_a_document_depends_on_options_and_index_alone(kind):
    first, again = source(kind), pickle.loads(pickle.dumps(source(kind)))
    assert len(first) == 2**32
    for i in (5, 2**32 - 1):
        assert first.parts(i) == again.parts(i) and first.parts(i) != first.parts(i - 1)
        for a, b in zip(first[i], again[i], strict=True):
            assert a == b if isinstance(a, Text) else np.array_equal(a.pixels, b.pixels)


@KIND
@pytest.mark.parametrize("size", (32, 64))
def test_documents_are_well_formed(kind, size):
    """Sprites lie in the picture, stand out and do not overlap; something is predicted; words have single spaces."""
    found = source(kind, size=size, objects=0)
    for i in range(40):
        parts, document = found.parts(i), found[i]
        assert any(part.predict if isinstance(part, Text) else part.generate for part in document)
        for part in document:
            if isinstance(part, Image):
                assert part.pixels.shape == (size, size, 3) and part.via == "flow"
            else:
                assert "  " not in part.text and "{" not in part.text and part.text[-1] != " "
        for part in parts:
            if isinstance(part, Shown):
                check(part.scene)


@KIND
def test_sprites_in_quarters_are_as_well_formed_and_what_the_words_say(kind):
    """Each fills a quarter; of two sprites of a caption, one relation holds, which is the one that it names."""
    free, quartered = source(kind), source(kind, quarters=True)
    for i in range(40):
        parts = quartered.parts(i)
        assert [type(part) for part in parts] == [type(part) for part in free.parts(i)]
        for part in parts:
            if isinstance(part, Text):
                continue
            check(part.scene)
            for each in part.scene.placed:
                assert each.side == 16 and {each.row, each.column} <= {0, 16}
            if len(part.scene.placed) == 2 and kind in ("two", "position", "attribution"):
                first, second = part.scene.placed
                assert [how for how in RELATIONS if related(first, how, second)] == [relation(part.scene)]
                assert kind != "position" or relation(part.scene) in parts[0].text


def test_plans_come_before_the_pictures_to_draw():
    parts = source("story", quarters=True, plan=True).parts(1)
    drawn = [i for i, part in enumerate(parts) if isinstance(part, Shown)]
    for i in drawn:
        written, scene = parts[i - 1], parts[i].scene
        assert written.predict and written.text == f" {plan(scene)}"
        ground, sprites = written.text.removeprefix(" on ").split(": ", 1)
        assert ground == scene.background
        standing = sorted(scene.placed, key=lambda each: each.corner)
        assert sprites.split(", ") == [f"{CORNERS[each.corner]} {in_plans(each.sprite)}" for each in standing]
    without = source("story", quarters=True).parts(1)
    assert [part for i, part in enumerate(parts) if i + 1 not in drawn] == without and len(drawn) > 1
    read = source("description", plan=True).parts(1)
    assert read == source("description").parts(1)  # its picture is given


def in_plans(sprite: art.Sprite) -> str:
    return f"{sprite.colour}: {sprite.noun}" if sprite.colour else name(sprite)


def test_plans_keep_a_colour_apart_from_its_noun():
    words, written = source("attribution", quarters=True, plan=True).parts(0)[:2]
    for place, noun in (each.split(": ") for each in written.text.split(": ", 1)[1].split(", ")):
        assert f"{place.split(' ', 2)[2]} {noun}" in words.text


def check(scene: Scene) -> None:
    assert scene.background in BACKGROUNDS and 1 <= len(scene.placed) <= 4
    taken = np.zeros((32, 32), int)
    for each in scene.placed:
        assert each.row >= 0 <= each.column and stands_out(each.sprite, scene.background)
        box = taken[each.row : each.row + each.side, each.column : each.column + each.side]
        assert box.shape == (each.side, each.side)
        box += 1
    assert taken.max() == 1


def combined(scene: Scene) -> set:
    """All combinations that could be held out."""
    counts = scene.counts
    found = {("pair", *sorted((a.index, b.index))) for a, b in combinations(counts, 2)}
    found |= {("colour", each.noun, each.colour) for each in counts if each.colour}
    found |= {("tone", each.noun, each.tone) for each in counts if each.tone}
    return found | {("count", each.noun, n) for each, n in counts.items() if n > 1}


def test_held_out_combinations_never_occur_in_training():
    """What held-out captions are about is in no document of the other parts; each of its elements is."""
    about = {"two": "pair", "position": "pair", "attribution": "pair", "counting": "count"}
    about |= {"colour": "colour", "tone": "tone"}
    seen, held = set(), set()
    for kind in KINDS:
        for part in PARTS[:3]:
            seen |= set().union(*map(combined, scenes(kind, 300, part=part)))
        if kind in about:
            new = set().union(*map(combined, scenes(kind, 300, part="held_out")))
            held |= {each for each in new if each[0] == about[kind]}
    assert not held & seen
    for what in ("pair", "count", "colour", "tone"):
        of_seen, of_held = ([each[1:] for each in group if each[0] == what] for group in (seen, held))
        assert len(of_held) >= 6
        assert {a for a, _ in of_held} <= {a for a, _ in of_seen} and {b for _, b in of_held} <= {b for _, b in of_seen}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NEVER])
def test_every_held_out_document_holds_something_out(kind):
    found = source(kind, part="held_out")
    for i in range(40):
        assert any(held_out(part.scene) for part in found.parts(i) if isinstance(part, Shown))


def test_the_grammar():
    assert [some(sprite(each)) for each in ("owl", "unicorn", "hourglass", "grapes", "bread", "orange book")] == [
        "an owl", "a unicorn", "an hourglass", "some grapes", "some bread", "an orange book",
    ]  # fmt: skip
    wanted = {"fox": "foxes", "butterfly": "butterflies", "monkey": "monkeys", "wolf": "wolves", "bus": "buses"}
    wanted |= {"roll of paper": "rolls of paper", "mouse": "mice", "fish": "fish", "peach": "peaches"}
    assert {noun: plural(noun) for noun in wanted} == wanted
    assert some(sprite("cook with dark skin")) == "a cook with dark skin" and not countable(sprite("jeans"))
    assert some(sprite("red heart"), 3) == "three red hearts"


def test_captions_are_parsed_to_what_they_say():
    for kind in CAPTIONS:
        for scene in scenes(kind, 60, objects=0):
            said = parse(describe(scene))
            assert said and said.holds(scene) and said.background == scene.background
            other = Scene(next(each for each in BACKGROUNDS if each != scene.background), scene.placed)
            assert not said.holds(other) and not said.holds(Scene(scene.background, scene.placed[1:]))
            if said.relation:
                a, b = (
                    Placed(p.sprite, q.row, q.column, q.side)
                    for p, q in zip(scene.placed, scene.placed[::-1], strict=True)
                )
                assert not said.holds(Scene(scene.background, (a, b)))
    assert parse("a dog and two cats").counts == {sprite("dog"): 1, sprite("cat"): 2}
    for wrong in (
        "",
        "a dogs",
        "dog",
        "two dog",
        "a dog above",
        "a dog on a loud background",
        "a dog and",
        "a dog a cat",
    ):
        assert parse(wrong) is None


@pytest.mark.parametrize("kind", ("two", "position", "attribution"))
def test_exactly_one_relation_holds_of_a_pair(kind):
    for scene in scenes(kind, 100):
        assert sum(related(*scene.placed[:1], each, *scene.placed[1:]) for each in RELATIONS) == 1


def test_edits_make_exactly_what_they_say():
    dog, cat, red, blue = map(sprite, ("dog", "cat", "red heart", "blue heart"))
    at, there = Placed(dog, 2, 1, 14), Placed(red, 17, 16, 14)
    scene = Scene("white", (at, there))
    cases = {
        Edit("replace", dog, cat): (Scene("white", (Placed(cat, 2, 1, 14), there)), "replace the dog with a cat"),
        Edit("remove", dog): (Scene("white", (there,)), "remove the dog"),
        Edit("add", None, cat, 1): (Scene("white", (at, there, Placed(cat, 1, 17, 14))), "add a cat in the upper right corner"),
        Edit("swap", dog, red): (
            Scene("white", (Placed(red, 2, 1, 14), Placed(dog, 17, 16, 14))),
            "swap the dog and the red heart",
        ),
        Edit("move", dog, None, 2): (Scene("white", (in_corner(dog, 2), there)), "move the dog to the lower left corner"),
        Edit("recolour", red, blue): (Scene("white", (at, Placed(blue, 17, 16, 14))), "make the red heart blue"),
        Edit("background", background="pink"): (Scene("pink", (at, there)), "make the background pink"),
    }  # fmt: skip
    for edit, (after, words) in cases.items():
        assert edit.apply(scene) == after and edit.words(0) == words
    cook, dark = sprite("cook with light skin"), sprite("cook with dark skin")
    given = Edit("tone", cook, dark)
    assert given.words(0) == "give the cook dark skin"
    assert given.apply(Scene("blue", (Placed(cook, 3, 4, 20),))) == Scene("blue", (Placed(dark, 3, 4, 20),))
    nothing = (Edit("replace", cat, dog), Edit("add", None, cat, 0), Edit("move", dog, None, 3), Edit("swap", dog, dog))
    assert not any(edit.apply(scene) for edit in (*nothing, Edit("background", background="white"), Edit("recolour")))


def test_every_edit_occurs():
    texts = " ".join(part.text for i in range(200) for part in source("edit").parts(i) if isinstance(part, Text))
    assert all(word in texts for word in ("replace", "remove", "add", "swap", "move", "colour", "skin", "background"))
    assert len(EDITS) == 8


def test_puzzles_are_answered_by_their_pictures():
    for i in range(60):
        asked, shown, answer = source("think").parts(i)
        *facts, question = asked.text.split(". ")
        corner = ("upper left", "upper right", "lower left", "lower right").index(
            question.removeprefix("what is in the ").removesuffix(" corner?")
        )
        there = [some(each.sprite) for each in shown.scene.placed if each.corner == corner] or ["nothing"]
        assert answer.text == f" {there[0]}" and len(facts) == 3
        for fact in facts[1:]:  # "a cat is above the dog"
            how = next(each for each in RELATIONS if f" {each} " in fact)
            a, b = fact.replace(" is ", " ").replace(" are ", " ").split(f" {how} the ")
            [x], [y] = ([p for p in shown.scene.placed if n in (some(p.sprite), name(p.sprite))] for n in (a, b))
            assert related(x, how, y)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size=48), "size must be 32 or 64, not 48"),
        (dict(objects=3), "at least 16, or 0 for all nouns, not 3"),
        (dict(kind="single", part="held_out"), "kind single have no held-out combinations; use part=test"),
    ],
)
def test_options_that_make_no_scenes(options, message):
    with pytest.raises(UserError, match=message):
        Scenes(options=SceneOptions(**options))
