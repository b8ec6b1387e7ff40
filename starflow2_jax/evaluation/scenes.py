"""The benchmark scenes: a GenEval in small, edits, questions, captions, stories and puzzles, judged exactly.

It differs from GenEval in that a picture may show nothing besides what its prompt asks for.
"""

import math
from dataclasses import replace

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text, counts
from starflow2_jax.data.scenes.kinds import CAPTIONS, KINDS, Parts
from starflow2_jax.data.scenes.scene import UNITS, render
from starflow2_jax.data.scenes.source import NEVER, SceneOptions, Scenes, rendered
from starflow2_jax.data.scenes.words import without_plans
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation import efficientnet
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Items, Page, Scores, Task
from starflow2_jax.evaluation.scenes_judge import Judge
from starflow2_jax.evaluation.scenes_verdicts import Verdict, judged, pictures, scenes
from starflow2_jax.models.gaussian_distance import frechet_of
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.sampling.scoring import score

GENEVAL = ("single", "two", "counting", "colour", "position", "attribution")  # whose mean is reported
AIMS = {
    "seen_single": 0.97,
    "seen_two": 0.85,
    "composed_two": 0.75,
    "seen_counting": 0.90,
    "composed_counting": 0.80,
    "seen_colour": 0.97,
    "composed_colour": 0.90,
    "seen_position": 0.90,
    "composed_position": 0.80,
    "seen_attribution": 0.85,
    "composed_attribution": 0.70,
    "seen_mean": 0.90,
    "composed_mean": 0.80,
    "seen_edit": 0.85,
    "seen_question": 0.95,
}
LIMIT = 100  # tasks of each kind, seen and composed apart
WORDS = 48  # tokens of a caption, an answer or a step
PLAN = 64  # tokens of a plan
# Chosen on the part "validation" with a model of scenes_quick: image temperatures from 0 to 0.6 and guidance up to 2
# score alike, and pictures at 0 have no noise.
DRAW = SampleOptions(temperature=0, image_temperature=0, image_first=True, max_images=1)
SAY = SampleOptions(temperature=0, max_images=0)
TELL = SampleOptions(temperature=0, image_temperature=0)
OPTIONS = dict.fromkeys(CAPTIONS, DRAW) | {
    "description": SAY,
    "question": SAY,
    "edit": DRAW,
    "story": TELL,
    "think": DRAW,
}
PICTURES = {"description": 0, "question": 0, "story": 3}  # most pictures of an answer; of all other kinds: one
ABOUT = (
    "Pictures of sprites on coloured grounds. A judge reads each picture by comparing it with all sprites in all "
    "places, so every verdict is exact. “Composed” tasks combine what training documents never show together: pairs of "
    "sprites, colours of things, skin tones of people, counts of objects."
)
EXAMPLES = 6  # examples of each kind on the page
COLUMNS = 10  # pictures in a row of the page's grid


class ScenesBenchmark(Benchmark):
    """Tasks "kind/seen/number" and "kind/composed/number", for a model of all nouns. The size is that of its pictures.

    The part "validation" is there to choose options of sampling by: it has no composed tasks, whose documents are held
    out. Raises UserError for `data`.
    """

    aims = AIMS
    parts = ("test", "validation")
    part = "test"  # of the source: seen tasks are from it
    objects = 0  # nouns of the vocabulary; 0: all
    quarters, plan = False, True  # of the model's training, see SceneOptions

    def __init__(self, data: str | None = None, limit: int | None = None):
        if data is not None:
            raise UserError("the benchmark scenes brings its own data; leave --data out")
        self.limit = limit or LIMIT
        self.size, self.tokens = UNITS, 64
        self.read = Judge(self.objects)

    @property
    def groups(self) -> dict[str, str]:
        """The groups of tasks, and the part of the source that each is from."""
        return {"seen": self.part} | ({"composed": "held_out"} if self.part == "test" else {})

    def begin(self, sampler: Sampler) -> None:
        """Take the size of pictures and their number of tokens from the model. Raises UserError for other pictures."""
        height, width, channels = sampler.codec.image_shape
        if not (sampler.codec.is_pixels and height == width and width in (UNITS, 2 * UNITS) and channels == 3):
            raise UserError(
                f"the benchmark scenes needs a model of RGB pictures of {UNITS} or {2 * UNITS} pixels a side, and this "
                f"checkpoint's have the shape {height} x {width} x {channels}; train it on the source scenes"
            )
        self.size, self.tokens = width, sampler.model.cfg.tokens

    def tasks(self) -> list[Task]:
        """The tasks, by kind. Their targets are whole documents, with scenes in the place of pictures."""
        return [
            Task(f"{kind}/{group}/{i}", rendered(asked(parts), self.size), parts, self._options(kind))
            for kind in KINDS
            for group in self.groups
            if (source := self._source(kind, group))
            for i, parts in enumerate(map(source.parts, range(self.limit)))
        ]

    def score(self, answers: list[Answer], sampler: Sampler) -> Scores:
        """Shares of right answers by group and kind, the means of GENEVAL, the likelihood of held-out pictures, and the
        Fréchet distance of drawn pictures from exact ones, which is None without the extra `fid`."""
        found: dict[str, Items] = {}
        for answer in answers:
            kind, group = of(answer.task)
            verdict = self.verdict(answer)
            for name, value in {"": float(verdict.right), **verdict.parts}.items():
                found.setdefault(f"{group}_{kind}{name and f'_{name}'}", {})[answer.task.key] = (value, 1.0)
        scores: dict[str, float | Items | None] = {**found}
        for group in self.groups:
            six = [found[name] for kind in GENEVAL if (name := f"{group}_{kind}") in found]
            scores[f"{group}_mean"] = {  # of the kinds, not of all pictures
                key: (value, 1 / len(items)) for items in six for key, (value, _) in items.items()
            }
            scores |= self._likelihood(sampler, group)
            scores[f"{group}_frechet_efficientnet_lite0"] = self._distance(answers, group)
        return scores

    def page(self, answers: list[Answer]) -> Page:
        """The first pictures of each kind of caption, and answers of every kind with their verdicts."""
        blank, columns = np.zeros((self.size, self.size, 3), np.float32), min(COLUMNS, self.limit)
        names, rows, examples = [], [], []
        for several in _grouped(answers):
            kind, group = of(several[0].task)
            if kind in CAPTIONS:
                names.append(f"{kind}, {group}")
                rows.append([next(iter(pictures(answer.document)), blank) for answer in several[:columns]])
            examples += [self._example(kind, group, answer) for answer in several[:EXAMPLES]]
        note = "The first pictures of each kind of prompt; prompts and verdicts are below."
        return Page(ABOUT, "Drawn scenes", note, tuple(names), np.array(rows), examples)

    def _example(self, kind: str, group: str, answer: Answer) -> tuple[str, Document]:
        verdict = self.verdict(answer)
        title = f"{kind}, {group}: {'right' if verdict.right else 'WRONG'} ({verdict.note})"
        return title, [*answer.task.prompt, *answer.document]

    def verdict(self, answer: Answer) -> Verdict:
        """Whether an answer is right, its plans left out."""
        document = [
            replace(part, text=without_plans(part.text)) if isinstance(part, Text) else part for part in answer.document
        ]
        return judged(self.read, of(answer.task)[0], answer.task.target, document)

    def _options(self, kind: str) -> SampleOptions:
        drawn = PICTURES.get(kind, 1)
        options = replace(OPTIONS[kind], image_first=False) if self.plan else OPTIONS[kind]
        words = (0 if kind in (*CAPTIONS, "edit") else WORDS) + PLAN * (self.plan and drawn > 0)
        return replace(options, max_tokens=drawn * (self.tokens + 2) + max(drawn, 1) * words + 2)

    def _source(self, kind: str, group: str, plan: bool = False) -> Scenes | None:
        """The documents of a kind and a group; None if this kind has none."""
        if group == "composed" and kind in NEVER:
            return None
        return Scenes(options=SceneOptions(kind, self.groups[group], self.size, self.objects, plan, self.quarters))

    def _distance(self, answers: list[Answer], group: str) -> float | None:
        """The Fréchet distance between the pictures that captions got and those that their documents have."""
        about = [answer for answer in answers if of(answer.task)[1] == group and of(answer.task)[0] in CAPTIONS]
        drawn = [picture for answer in about for picture in pictures(answer.document)[:1]]
        exact = [render(scene, self.size) for answer in about for scene in scenes(answer.task.target)]
        if min(len(drawn), len(exact)) < 2 or not efficientnet.available():
            return None
        return frechet_of(*(efficientnet.features(np.stack(each)) for each in (drawn, exact)))

    def _likelihood(self, sampler: Sampler, group: str) -> dict[str, float | None]:
        """NLL of pictures given their captions, with the noise of the training: nats per dimension without 0.5 ln 2 pi
        as in training, and bits per dimension of 8-bit levels."""
        sources = [source for kind in CAPTIONS if (source := self._source(kind, group, self.plan))]
        rng = np.random.default_rng(0)
        documents = [noisy(sources[i % len(sources)][i], sampler.noise, rng) for i in range(self.limit)]
        scores = [image for *_, image in score(sampler, documents)]
        nats = float(np.mean([each.nats_per_dim for each in scores])) - 0.5 * math.log(2 * math.pi)
        bits = float(np.mean([each.bits_per_dim for each in scores]))
        return {f"{group}_nll_nats_per_dim": nats, f"{group}_nll_bits_per_dim": bits}


class QuickScenesBenchmark(ScenesBenchmark):
    """The benchmark for a model of the first 60 nouns, whose sprites fill quarters of the picture."""

    objects, quarters = 60, True


def of(task: Task) -> tuple[str, str]:
    """The kind and the group of a task."""
    kind, group, _ = task.key.split("/")
    return kind, group


def asked(parts: Parts) -> Parts:
    """A document up to the first part that the model should write."""
    first = next(i for i, part in enumerate(parts) if (part.predict if isinstance(part, Text) else part.generate))
    return parts[:first]


def noisy(document: Document, noise: float, rng: np.random.Generator) -> Document:
    """The document with noise N(0, noise^2) on the images that count."""
    return [
        replace(part, pixels=(part.pixels + noise * rng.standard_normal(part.pixels.shape)).astype(np.float32))
        if isinstance(part, Image) and counts(part)
        else part
        for part in document
    ]


def _grouped(answers: list[Answer]) -> list[list[Answer]]:
    """Answers by kind and group, in their order."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(of(answer.task), []).append(answer)
    return list(groups.values())
