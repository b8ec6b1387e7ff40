"""The judge of scenes: exact on rendered scenes, right on damaged ones, and silent on noise."""

import io
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageFilter

from starflow2_jax.data.images import as_pillow, from_pillow
from starflow2_jax.data.scenes.art import vocabulary
from starflow2_jax.data.scenes.kinds import CAPTIONS, Shown
from starflow2_jax.data.scenes.scene import BACKGROUNDS, Placed, Scene, render, stands_out
from starflow2_jax.data.scenes.source import SceneOptions, Scenes
from starflow2_jax.evaluation.scenes_judge import Judge

EACH = 6  # scenes of each kind
TWO = (("circle", "orange"), ("square", "yellow"))
VOCABULARIES = pytest.mark.parametrize("size, objects", ((32, 60), (64, 0)))


@cache
def scenes(objects: int) -> list[Scene]:
    found = []
    for kind in (*CAPTIONS, "story", "think", "edit"):
        source = Scenes(options=SceneOptions(kind=kind, part="test", objects=objects))
        found += [next(part.scene for part in source.parts(i) if isinstance(part, Shown)) for i in range(EACH)]
    return found


def noisy(picture: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return picture + deviation * rng.standard_normal(picture.shape)


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return from_pillow(as_pillow(picture).filter(ImageFilter.GaussianBlur(radius)))


def compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    as_pillow(picture).save(file, "jpeg", quality=quality)
    with Pillow.open(file) as opened:
        return from_pillow(opened)


def places(scene: Scene) -> tuple[str, Counter[Placed]]:
    return scene.background, Counter(scene.placed)


@VOCABULARIES
def test_exact_on_rendered_scenes(size, objects):
    judge = Judge(objects)
    for scene in scenes(objects):
        assert places(judge(render(scene, size))) == places(scene)


def test_every_sprite_is_told_from_all_others():
    """Every third of the 497, at a side of 20 or 24 units, on a ground of its own."""
    judge, rng = Judge(), np.random.default_rng(0)
    for sprite in vocabulary(0)[::3]:
        background = rng.choice([name for name in BACKGROUNDS if stands_out(sprite, name)])
        scene = Scene(str(background), (Placed(sprite, 3, 5, int(rng.choice((20, 24)))),))
        assert places(judge(render(scene, 32))) == places(scene)


@VOCABULARIES
@pytest.mark.parametrize(
    "damage, amount, least",
    [
        ("noise", 0.2, 0.98),  # standard deviation, of levels in [-1, 1]
        ("blur", 0.7, 0.98),  # radius, in pixels
        ("jpeg", 75, 0.97),  # quality
        ("jpeg", 50, 0.95),
        ("drift", 0.1, 0.98),  # of each colour channel, of levels in [-1, 1]
    ],
)
def test_right_on_damaged_scenes(size, objects, damage, amount, least):
    """The share of scenes whose ground and numbers of sprites are read right."""
    judge, rng, right = Judge(objects), np.random.default_rng(0), []
    for scene in scenes(objects):
        picture = render(scene, size)
        if damage == "noise":
            picture = noisy(picture, amount, rng)
        elif damage == "drift":
            picture = picture + rng.uniform(-amount, amount, 3)
        else:
            picture = blurred(picture, amount) if damage == "blur" else compressed(picture, int(amount))
        found = judge(picture)
        right.append(found.background == scene.background and found.counts == scene.counts)
    assert np.mean(right) >= least


def test_nothing_on_noise():
    """Uniform and normal noise, and empty grounds with noise."""
    judge, rng = Judge(60), np.random.default_rng(0)
    pictures = [rng.uniform(-1, 1, (32, 32, 3)) for _ in range(30)]
    pictures += [rng.normal(0, deviation, (32, 32, 3)) for deviation in (0.2, 0.5, 1, 2) for _ in range(10)]
    assert not any(judge(picture).placed for picture in pictures)
    assert all(judge(picture).background == "" for picture in pictures[:30])
    for background in BACKGROUNDS:
        empty = Scene(background, ())
        assert judge(render(empty, 32)) == empty == judge(noisy(render(empty, 32), 0.2, rng))


def test_blobs_are_not_objects():
    """Sprites that are blurred beyond recognition are not found."""
    judge = Judge(60)
    objects = [sprite for sprite in vocabulary(60) if sprite.kind == "object" and stands_out(sprite, "white")]
    found = [judge(blurred(render(Scene("white", (Placed(s, 6, 6, 20),)), 32), 4.0)).counts[s] for s in objects]
    assert np.mean(found) < 0.1


def test_a_large_sprite_of_a_grounds_colour():
    """A green square covers more than half of a white ground."""
    [square] = [s for s in vocabulary(60) if (s.noun, s.colour) == ("square", "green")]
    scene = Scene("white", (Placed(square, 4, 4, 24),))
    assert places(Judge(60)(render(scene, 32))) == places(scene)


def test_two_sprites_are_not_taken_for_a_large_one():
    """An orange circle above a yellow square explains less than one larger sprite over both, and fits better."""
    circle, square = (next(s for s in vocabulary(60) if (s.noun, s.colour) == each) for each in TWO)
    scene = Scene("blue", (Placed(circle, 0, 5, 16), Placed(square, 16, 5, 16)))
    assert places(Judge(60)(render(scene, 32))) == places(scene)
