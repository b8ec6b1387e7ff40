"""What benchmarks of understanding share: pictures and a question go in, and a letter or a few words come out."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starflow2_jax.data.documents import Document, StoredImage, Text
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation import tables
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Items, Scores, Task
from starflow2_jax.evaluation.tables import Row
from starflow2_jax.evaluation.user_files import Needed, facts
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions

LETTERS = "ABCDEFGHIJ"
BY_LETTER = "Answer with the option's letter from the given choices directly."
BY_WORD = "Answer the question using a single word or phrase."
MARK = re.compile(r"<image (\d)>")  # the place of a picture in a text
CHOSEN = re.compile(r"\W*([A-J])(?![\w'])")  # a letter at the beginning of an answer, as in "(B) a cat"


@dataclass(frozen=True)
class Question:
    """A row of a table. answer: a letter, a word, a list of right words, or None if it is hidden."""

    key: str
    text: str
    choices: dict[str, str]  # by letter; empty for an open question
    hint: str
    answer: Any
    row: Row

    @property
    def category(self) -> str:
        """The row's category or subfield; "all" if it has none."""
        return str(self.row.get("category") or self.row.get("subfield") or "all")


class Questions(Benchmark):
    """A benchmark of questions. A subclass names its files and its wording, and may write files for its own scorer.

    `--prompts` is a local copy of the data set in one of the forms of `tables.read`. Raises UserError for others.
    """

    needed: Needed
    split = "test"
    tokens = 16  # of an answer
    template = "{hint}{question}\n{choices}\n{ask}"  # of a question with choices
    opened = "{hint}{question}\n{ask}"  # of one without

    def __init__(self, data: str | None = None, limit: int | None = None):
        self.path = self.needed.path(data)
        self.folder, self.via, self.limit = (self.path if self.path.is_dir() else self.path.parent), "vit", limit
        self.parts = tables.splits(self.path)
        self.choose(self.split)
        self.facts = facts(self.path)

    def choose(self, part: str) -> None:
        """Read the questions of a split. Raises UserError."""
        self.part = self.split = part
        self.asked = [self.question(row, i, self.path) for i, row in enumerate(self.rows(self.path))][: self.limit]
        if not self.asked:
            self.needed.refuse(self.path, "holds no questions")

    def rows(self, path: Path) -> list[Row]:
        """The rows of the user's table."""
        return tables.read(self.needed, path, self.split)

    def question(self, row: Row, number: int, path: Path) -> Question:
        """The question in a row, whatever names the columns have in the forms of the data set."""
        where = f"{path}, row {number},"
        self.needed.require(where, row, ("question",))
        key = next(
            (str(row[name]) for name in ("id", "question_id", "index") if row.get(name) is not None), str(number)
        )
        named = {letter: row.get(letter, row.get(f"choice_{letter.lower()}")) for letter in LETTERS}
        if row.get("options") is not None:
            named = dict(zip(LETTERS, tables.listed(row["options"]), strict=False))
        choices = {letter: str(text) for letter, text in named.items() if text not in (None, "nan")}
        answer = row.get("answer")
        if choices and str(answer).isdigit() and int(str(answer)) < len(choices):
            answer = LETTERS[int(str(answer))]  # AI2D counts from 0
        hint = row.get("hint")
        return Question(key, str(row["question"]), choices, "" if hint in (None, "nan") else f"{hint} ", answer, row)

    def begin(self, sampler: Sampler) -> None:
        """Show the pictures through the vision tower, or as flow tokens to a model without one."""
        self.via = "vit" if sampler.model.cfg.vlm.vision else "flow"

    def tasks(self) -> list[Task]:
        """The questions. A key that occurs twice, as in MME, gets a number."""
        options = SampleOptions(temperature=0, max_images=0, max_tokens=self.tokens)
        seen: Counter[str] = Counter()
        found = []
        for asked in self.asked:
            seen[asked.key] += 1
            key = asked.key if seen[asked.key] == 1 else f"{asked.key}#{seen[asked.key]}"
            found.append(Task(key, self._prompt(asked), asked, options, chat=True))
        return found

    def wording(self, asked: Question) -> str:
        """The question as the model reads it."""
        choices = "\n".join(f"{letter}. {text}" for letter, text in asked.choices.items())
        template, ask = (self.template, BY_LETTER) if choices else (self.opened, BY_WORD)
        return template.format(hint=asked.hint, question=asked.text.strip(), choices=choices, ask=ask)

    def _prompt(self, asked: Question) -> list:
        shown = {i: replace(each, via=self.via) for i, each in tables.pictures(asked.row, self.folder).items()}
        first, *rest = MARK.split(self.wording(asked))
        if not rest:
            return [*shown.values(), Text(first)]
        prompt: list[Text | StoredImage] = [Text(first)]
        for number, text in zip(rest[::2], rest[1::2], strict=True):
            if int(number) not in shown:
                raise UserError(f"question {asked.key} names <image {number}>, and its row has no such picture")
            prompt += [shown[int(number)], Text(text)]
        return [part for part in prompt if not isinstance(part, Text) or part.text.strip()]

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write predictions.tsv, which VLMEvalKit reads, and the files of the benchmark's own scorer."""
        folder = out / self.needed.benchmark
        folder.mkdir()
        write_table(
            folder / "predictions.tsv",
            [tables.columns(answer.task.target.row) | {"prediction": said(answer.document)} for answer in answers],
        )
        self.official([(answer.task.target, said(answer.document)) for answer in answers], folder)

    def official(self, predictions: list[tuple[Question, str]], folder: Path) -> None:
        """Write the files of the benchmark's own scorer into its folder."""

    def score(self, answers: list[Answer], sampler: Sampler) -> Scores:
        """The share of right answers, by equality alone: a check of the run. The benchmark's scorer parses more."""
        found: dict[str, Items] = {}
        for answer in answers:
            asked = answer.task.target
            if asked.answer is not None and asked.answer != "?":
                right = is_right(asked, said(answer.document))
                for group in {"all", asked.category}:
                    found.setdefault(group, {})[answer.task.key] = (float(right), 1.0)
        every = found.pop("all", {})
        return {"exact_match": every} | {f"exact_match_{group}": found[group] for group in sorted(found)}


def copies(benchmark: str, dataset: str, table: str, part: str = "") -> Needed:
    """What a benchmark of questions needs: a data set as lmms-eval reads it, or a table of VLMEvalKit."""
    return Needed(
        benchmark,
        f"a copy of the data set {dataset}{part and f' ({part})'} or of {table}.tsv",
        f"huggingface.co/datasets/lmms-lab/{dataset} or opencompass.openxlab.space/utils/VLMEval/{table}.tsv",
    )


def said(document: Document) -> str:
    """The words of an answer, on one line."""
    return " ".join("".join(part.text for part in document if isinstance(part, Text)).split())


def letter(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer begins with, or that of the choice that it repeats; None if it does neither."""
    if (match := CHOSEN.match(prediction)) and match[1] in choices:
        return match[1]
    return next((name for name, text in choices.items() if _plain(text) == _plain(prediction)), None)


def is_right(asked: Question, prediction: str) -> bool:
    """Whether an answer is the letter, or one of the words, that is right; yes and no may be followed by more."""
    if asked.choices:
        return letter(prediction, asked.choices) == str(asked.answer).strip().upper()
    right = [_plain(str(each)) for each in tables.listed(asked.answer)]
    words = _plain(prediction).split()
    return _plain(prediction) in right or (right in (["yes"], ["no"]) and words[:1] == right)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as tab-separated values, with all their columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_category(predictions: Iterable[tuple[Question, str]]) -> dict[str, list[tuple[Question, str]]]:
    """The predictions grouped by the category of their question; each group keeps their order."""
    groups: dict[str, list[tuple[Question, str]]] = {}
    for asked, prediction in predictions:
        groups.setdefault(asked.category, []).append((asked, prediction))
    return groups


def _plain(text: str) -> str:
    return re.sub(r"[^\w\s]", "", text).strip().lower()
