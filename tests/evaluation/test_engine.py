"""The engine that runs any benchmark: seeds, several processes, and answers that are there already."""

from types import SimpleNamespace

import numpy as np
import pytest

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.engine import evaluate
from starflow2_jax.evaluation.protocol import Benchmark, Task, seed_of
from starflow2_jax.sampling.batch_files import Share
from starflow2_jax.sampling.rows import SampleOptions

RUN = {"checkpoint": "here"}


class Colours(Benchmark):
    """Tasks whose right answer is the colour in the prompt."""

    samples = 2

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def tasks(self) -> list[Task]:
        return [Task(name, [Text(f"say {name}")], name, SampleOptions(max_tokens=4)) for name in self.names]

    def export(self, answers, out) -> None:
        (out / "for_the_scorer.txt").write_text(" ".join(f"{a.task.key}{a.k}" for a in answers))

    def score(self, answers, sampler) -> dict[str, float | None]:
        assert all(isinstance(part, Image) and part.generate for a in answers for part in a.document[1:])
        return {"right": float(np.mean([a.document[0].text == a.task.target for a in answers]))}


class Speaker:
    """A sampler that repeats the word in its prompt unless it is "red"; `drawn`: all seeds that it was given."""

    model = SimpleNamespace(cfg=SimpleNamespace(tokens=4))
    codec = SimpleNamespace(is_pixels=True, makes_pixels=True, image_channels=1)

    def __init__(self):
        self.drawn: list[int] = []

    def generate(self, prompts, options, seeds, num, rows) -> list[Document]:
        self.drawn += seeds
        said = [prompt[0].text.split()[1] for prompt in prompts for _ in range(num)]
        return [[Text("rot" if word == "red" else word), Image(np.zeros((2, 2, 1)))] for word in said]


def test_answers_are_scored_and_exported(tmp_path):
    numbers, page = evaluate(Speaker(), Colours(("red", "blue")), tmp_path, RUN, progress=False)
    assert numbers == {"right": 0.5} and page is None
    assert (tmp_path / "for_the_scorer.txt").read_text() == "red0 red1 blue0 blue1"


def test_seeds_depend_on_base_key_and_k_alone(tmp_path):
    drawn = []
    for i, names in enumerate((("red", "blue"), ("blue", "green", "red"))):
        speaker = Speaker()
        evaluate(speaker, Colours(names), tmp_path / str(i), RUN, seed=5, batch=1 + i, progress=False)
        drawn.append({name: speaker.drawn[2 * n : 2 * n + 2] for n, name in enumerate(names)})
    assert drawn[0] == {name: drawn[1][name] for name in ("red", "blue")}
    assert drawn[0]["red"] == [seed_of(5, "red", k) for k in range(2)]
    seeds = [seed_of(base, key, k) for base in range(9) for key in ("a", "a/1", "b") for k in range(9)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of(0, "read/3", 1) == 2005628005  # for ever


def test_processes_share_the_tasks_and_the_last_one_scores(tmp_path):
    names, speakers = ("red", "blue", "green"), [Speaker(), Speaker()]
    benchmark = Colours(names)
    assert evaluate(speakers[1], benchmark, tmp_path, RUN, batch=1, share=Share(1, 2), progress=False) is None
    assert not (tmp_path / "for_the_scorer.txt").exists()
    numbers, _ = evaluate(speakers[0], benchmark, tmp_path, RUN, batch=1, share=Share(0, 2), progress=False)
    assert numbers == {"right": pytest.approx(2 / 3)} and [len(s.drawn) for s in speakers] == [4, 2]
    again = Speaker()
    assert evaluate(again, benchmark, tmp_path, RUN, progress=False)[0] == numbers and not again.drawn


def test_other_tasks_are_another_run(tmp_path):
    evaluate(Speaker(), Colours(("red",)), tmp_path, RUN, progress=False)
    with pytest.raises(UserError, match="another run, whose tasks"):
        evaluate(Speaker(), Colours(("red", "blue")), tmp_path, RUN, progress=False)
    with pytest.raises(UserError, match="same key"):
        evaluate(Speaker(), Colours(("red", "red")), tmp_path / "new", RUN, progress=False)
