"""The benchmark scenes: its numbers for answers that are known, and the whole command on a tiny checkpoint."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scenes_experiment

from starflow2_jax import cli
from starflow2_jax.codecs.fingerprint import fingerprint
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.scenes.kinds import CAPTIONS, KINDS, Shown
from starflow2_jax.data.scenes.scene import BACKGROUNDS, Placed, Scene, render, visible
from starflow2_jax.data.scenes.source import NEVER, planned, rendered
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation import efficientnet, protocol
from starflow2_jax.evaluation import scenes as evaluation
from starflow2_jax.evaluation.protocol import Answer
from starflow2_jax.evaluation.scenes import QuickScenesBenchmark, ScenesBenchmark, asked
from starflow2_jax.evaluation.scenes_verdicts import region_error, scenes, spoken
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.parallel.content_hash import content_hash
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import Score

LIMIT = 8


def sampler(**changes) -> SimpleNamespace:
    codec = dict(image_shape=(32, 32, 3), is_pixels=True) | changes
    return SimpleNamespace(
        codec=SimpleNamespace(**codec), model=SimpleNamespace(cfg=SimpleNamespace(tokens=16)), noise=0.1
    )


@pytest.fixture
def benchmark(monkeypatch) -> QuickScenesBenchmark:
    """Every picture has a likelihood of -1.5 nats per dimension."""

    def score(_, documents):
        return [[Score(1, np.full(16, -1.5 * 192), 3072, 7.0)] for _ in documents]

    monkeypatch.setattr(evaluation, "score", score)
    monkeypatch.setattr(efficientnet, "available", lambda: False)  # it would take seconds in every test
    found = QuickScenesBenchmark(limit=LIMIT)
    found.begin(sampler())
    return found


def right(task) -> list:
    """The answer that the document itself gives."""
    return rendered(task.target[len(task.prompt) :], 32)


def numbers(benchmark, answer) -> dict:
    return protocol.numbers(benchmark.score([Answer(task, 0, answer(task)) for task in benchmark.tasks()], sampler()))


def test_tasks_are_documents_up_to_what_is_asked(benchmark):
    tasks = benchmark.tasks()
    keys = [task.key for task in tasks]
    assert len(set(keys)) == len(keys) == LIMIT * (2 * len(KINDS) - len(NEVER))
    for task in tasks:
        assert not any(isinstance(part, Text) and part.predict for part in task.prompt)
        assert len(task.prompt) < len(task.target)
        assert task.options.max_tokens > 18 or "question" in task.key or "description" in task.key
        assert len(task.prompt) == len(asked(task.target))


def test_right_answers_are_right(benchmark):
    found = numbers(benchmark, right)
    nll = {name: value for name, value in found.items() if "nll" in name}
    errors = {name: value for name, value in found.items() if "error" in name}
    assert max(errors.values()) < 1e-3 and len(errors) == 2
    assert {value for name, value in found.items() if name not in nll | errors} == {1.0, None}  # None: no distance
    assert set(evaluation.AIMS) <= set(found)
    assert {f"{group}_mean" for group in ("seen", "composed")} <= set(found)
    assert nll["seen_nll_nats_per_dim"] == pytest.approx(1.5 - 0.5 * np.log(2 * np.pi))
    assert nll["composed_nll_bits_per_dim"] == pytest.approx(1.5 / np.log(2) + 7)


def test_worse_pictures_are_farther_away(benchmark, monkeypatch):
    """The Fréchet distance of a group; None where the network is not installed."""

    def noisy(noise: float):
        rng = np.random.default_rng(0)
        return lambda task: [
            replace(part, pixels=(part.pixels + noise * rng.standard_normal((32, 32, 3))).astype(np.float32))
            if isinstance(part, Image)
            else part
            for part in right(task)
        ]

    assert numbers(benchmark, right)["seen_frechet_efficientnet_lite0"] is None
    monkeypatch.setattr(efficientnet, "available", lambda: True)
    exact, little, much = (
        benchmark._distance([Answer(task, 0, noisy(noise)(task)) for task in benchmark.tasks()], "composed")
        for noise in (0, 0.1, 0.4)
    )
    assert abs(exact) < 0.1 < little < much


def test_right_answers_with_plans_are_right(benchmark, monkeypatch):
    """A model that plans writes each plan in one text with the words before it, and has room for both."""
    monkeypatch.setattr(QuickScenesBenchmark, "plan", True)

    def planned_answer(task):
        parts = [each for part in task.target[len(task.prompt) :] for each in planned(part)]
        joined = []
        for part in parts:
            if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
                joined[-1] = replace(part, text=joined[-1].text + part.text)
            else:
                joined.append(part)
        return rendered(joined, 32)

    found = numbers(benchmark, planned_answer)
    assert all(value == 1 for name, value in found.items() if not {"nll", "error", "frechet"} & set(name.split("_")))
    assert not any(task.options.image_first for task in benchmark.tasks())
    with_plans = {task.key: task.options.max_tokens for task in benchmark.tasks()}
    monkeypatch.setattr(QuickScenesBenchmark, "plan", False)
    more = {task.key.split("/")[0]: with_plans[task.key] - task.options.max_tokens for task in benchmark.tasks()}
    assert (more["single"], more["story"], more["think"], more["question"]) == (64, 192, 64, 0)


def test_who_says_and_draws_nothing_has_nothing_right(benchmark):
    found = numbers(benchmark, lambda task: [])
    assert {value for name, value in found.items() if "nll" not in name} == {0.0, None}  # None: no distance


@pytest.mark.parametrize("kind", ("two", "counting", "attribution", "position"))
def test_a_missing_sprite_is_wrong(benchmark, kind):
    def answer(task):
        scene = scenes(task.target)[-1]
        return rendered([Shown(replace(scene, placed=scene.placed[1:]), True)], 32)

    found = numbers(benchmark, answer)
    assert found[f"seen_{kind}"] == found[f"composed_{kind}"] == 0


def test_positions_and_backgrounds_count_where_they_are_asked_for(benchmark):
    """The two sprites change places on another ground: still two objects, but not in that position."""

    def answer(task):
        scene = scenes(task.target)[-1]
        places = scene.placed[::-1]
        moved = tuple(Placed(a.sprite, b.row, b.column, b.side) for a, b in zip(scene.placed, places, strict=True))
        grounds = (each for each in BACKGROUNDS if each != scene.background and visible(Scene(each, moved)))
        return rendered([Shown(Scene(next(grounds), moved), True)], 32)

    found = numbers(benchmark, answer)
    assert found["seen_position"] == 0 == found["seen_background"] and found["composed_position"] == 0
    assert found["seen_two"] == 1 == found["seen_attribution"]


def test_the_parts_of_an_edit(benchmark):
    """A picture that is as asked but has a frame: the change is made, the rest is not kept."""

    def answer(task):
        parts = right(task)
        for picture in (part.pixels for part in parts if isinstance(part, Image)):
            for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
                edge[:] = np.where(edge.mean(0) > 0, -0.6, 0.6)
        return parts

    found = numbers(benchmark, answer)
    assert found["seen_edit"] == 0 and found["seen_edit_region_error"] > 0.25 and found["seen_edit_change"] >= 0.5
    unchanged = numbers(benchmark, lambda task: [p for p in task.prompt if isinstance(p, Image)][:1])
    assert unchanged["seen_edit"] == unchanged["seen_edit_change"] == 0 == unchanged["composed_edit"]


def test_the_region_of_an_edit():
    """Inside the boxes of changed sprites, anything may be."""
    before, after = scenes(scenes_experiment.edit(0))
    picture = render(after, 32)
    assert region_error(picture, before, after) == 0
    [changed] = [p for p in after.placed if p not in before.placed]
    picture[changed.row : changed.row + changed.side, changed.column : changed.column + changed.side] = 1
    assert region_error(picture, before, after) == 0
    picture[0] += 0.5
    assert region_error(picture, before, after) > 0


def test_stories_keep_their_places(benchmark):
    """All sprites of a story may be elsewhere in their quarters, if they stay there; a step that moves them is
    wrong.
    """
    benchmark.quarters = False  # sprites that fill their quarters have no room to move

    def told(shift) -> float:
        def answer(task):
            if not task.key.startswith("story"):
                return []
            shown, parts = 0, []
            for part in task.target[len(task.prompt) :]:
                if isinstance(part, Shown):
                    row, column = shift(shown)
                    placed = tuple(
                        replace(p, row=(p.row // 16 * 16 + row) % 32, column=p.column // 16 * 16 + column)
                        for p in part.scene.placed
                    )
                    part, shown = Shown(replace(part.scene, placed=placed), True), shown + 1
                parts.append(part)
            return rendered(parts, 32)

        return numbers(benchmark, answer)["seen_story"]

    assert told(lambda i: (2, 2)) == told(lambda i: (0, 1)) == 1
    assert told(lambda i: (0, 0) if i else (16, 0)) == 0
    wrong_words = numbers(benchmark, lambda t: [Text(" x") if isinstance(p, Text) else p for p in right(t)])
    assert wrong_words["seen_story"] == wrong_words["seen_think"] == 0 and wrong_words["seen_think_picture"] == 1


def test_captions_may_say_it_differently(benchmark):
    """A true caption with the sprites in the other order is right; one without the ground is not."""

    def turned(task):
        said = spoken(task.target[-1:])
        pairs = (("to the left of", "to the right of"), ("above", "below"))
        for how, back in (*pairs, *(pair[::-1] for pair in pairs)):
            if f" {how} " in said:
                a, b = said.partition(" on a ")[0].split(f" {how} ")
                return [Text(f" {b} {back} {a} on a {said.partition(' on a ')[2]}", predict=True)]
        return [Text(said, predict=True)]

    assert numbers(benchmark, turned)["seen_description"] == 1
    bare = numbers(benchmark, lambda task: [Text(spoken(task.target[-1:]).partition(" on a ")[0])])
    assert bare["seen_description"] == 0


def test_the_page_has_pictures_and_verdicts(benchmark):
    answers = [Answer(task, 0, right(task)) for task in benchmark.tasks()]
    page = benchmark.page(answers)
    rows = 2 * len(CAPTIONS) - len(NEVER)
    assert page.grid.shape == (rows, LIMIT, 32, 32, 3) and len(page.names) == rows
    assert all(": right (" in title for title, _ in page.examples)
    [title] = [title for title, document in page.examples if title.startswith("background, seen")][:1]
    assert "on " in title
    blank = benchmark.page([replace(answer, said=[]) for answer in answers])
    assert (blank.grid == 0).all() and all("WRONG" in title for title, _ in blank.examples)


def test_validation_shows_neither_test_nor_held_out_documents():
    test, validation = (open_benchmark("scenes_quick", limit=LIMIT, part=part) for part in (None, "validation"))
    of_test, of_validation = ({task.key: spoken(task.target) for task in b.tasks()} for b in (test, validation))
    assert {key.split("/")[1] for key in of_validation} == {"seen"} and of_validation.keys() < of_test.keys()
    assert sum(of_test[key] != words for key, words in of_validation.items()) > len(of_validation) / 2
    for name, part in (("scenes", "train"), ("digits", "validation")):
        with pytest.raises(UserError, match=f"none named '{part}'"):
            open_benchmark(name, part=part)


def test_models_and_data_that_do_not_fit():
    with pytest.raises(UserError, match="leave --data out"):
        ScenesBenchmark(data="here")
    for wrong in (dict(image_shape=(8, 8, 1)), dict(image_shape=(32, 64, 3)), dict(is_pixels=False)):
        with pytest.raises(UserError, match="train it on the source scenes"):
            ScenesBenchmark().begin(sampler(**wrong))


@pytest.mark.slow
def test_a_tiny_checkpoint_is_evaluated(tmp_path):
    run, out = tmp_path / "run", tmp_path / "report"
    assert cli.main(["train", "--config", scenes_experiment.__file__, "--out", str(run)]) == 0
    command = ["eval", "--benchmark", "scenes_quick", "--checkpoint", str(run), "--limit", "1", "--out", str(out)]
    assert cli.main(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert set(evaluation.AIMS) <= set(report) and np.isfinite(report["composed_nll_bits_per_dim"])
    assert (out / "samples.png").is_file()
    described, sampler = json.loads((out / "answers/run.json").read_text()), Sampler.restore(run)
    assert described["weights"] == content_hash(sampler.params)[:16] and described["average"] is True
    assert described["codec"] == fingerprint(sampler.codec)[:16] and described["image"] == [32, 32, 3]
    assert described["batch"] == 64 and described["versions"]["jax"] == jax.__version__
    assert cli.main([*command, "--batch", "8"]) == UserError.exit_code  # other batches give other bits
    assert "WRONG" in (out / "index.html").read_text()


def test_asked():
    parts = [Text("draw a dog"), Shown(Scene("white", ()), generate=True)]
    assert asked(parts) == parts[:1]
