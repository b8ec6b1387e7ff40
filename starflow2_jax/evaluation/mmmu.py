"""MMMU: college questions with pictures among their words (github.com/MMMU-Benchmark/MMMU)."""

import json
import re
from pathlib import Path

from starflow2_jax.evaluation import tables
from starflow2_jax.evaluation.questions import Question, Questions, copies, letter
from starflow2_jax.evaluation.tables import Row

KEY = re.compile(r"[a-z]+_(\w+)_\d+")  # such as validation_Art_Theory_3


class MmmuBenchmark(Questions):
    """The validation split, or another one that --prompts names alone. MMMU's own copy has a folder for each
    subject.
    """

    needed = copies("mmmu", "MMMU", "MMMU_DEV_VAL")
    split, tokens = "validation", 128
    template = "{hint}{question}\n{choices}\n\n{ask}"
    opened = "{hint}{question}\n\n{ask}"

    def rows(self, path: Path) -> list[Row]:
        """The questions of all subjects."""
        folders = sorted({file.parent for file in path.glob(f"*/{self.split}-*.parquet")})
        if len(folders) < 2:
            return super().rows(path)
        return [row for folder in folders for row in tables.read(self.needed, folder, self.split)]

    def question(self, row: Row, number: int, path: Path) -> Question:
        """As in Questions. The subject must be able to name a folder."""
        asked = super().question(row, number, path)
        self.needed.file_name(f"{path}, row {number},", _subject(asked))
        return asked

    def official(self, predictions: list[tuple[Question, str]], folder: Path) -> None:
        """Write SUBJECT/output.json for main_parse_and_eval.py, and answers.json, which holds letters, for EvalAI."""
        subjects: dict[str, list[dict]] = {}
        answers = {}
        for asked, prediction in predictions:
            answers[asked.key] = (letter(prediction, asked.choices) if asked.choices else None) or prediction
            gold = tables.listed(asked.answer)
            row = {
                "id": asked.key,
                "question_type": "multiple-choice" if asked.choices else "short-answer",
                "answer": gold[0] if len(gold) == 1 else gold,
                "response": prediction,
            }
            if asked.choices:
                row |= {"all_choices": list(asked.choices), "index2ans": asked.choices}
            subjects.setdefault(_subject(asked), []).append(row)
        for subject, rows in subjects.items():
            (folder / subject).mkdir()
            (folder / subject / "output.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (folder / "answers.json").write_text(json.dumps(answers, indent=1), encoding="utf-8")


def _subject(asked: Question) -> str:
    match = KEY.fullmatch(asked.key)
    return match[1] if match else asked.category
