"""MME: two questions for each picture, of which one has the answer yes and one the answer no
(github.com/BradyFU/Awesome-Multimodal-Large-Language-Models).
"""

from pathlib import Path

from starflow2_jax.evaluation.questions import Question, Questions, by_category, copies
from starflow2_jax.evaluation.tables import Row

ASKED = " Please answer yes or no."  # the end of MME's own questions; lmms-eval asks for a word or a phrase instead


class MmeBenchmark(Questions):
    """All of its 14 categories, or those that the table has."""

    needed = copies("mme", "MME", "MME")

    def question(self, row: Row, number: int, path: Path) -> Question:
        """As in Questions. The category must be able to name a file."""
        asked = super().question(row, number, path)
        self.needed.file_name(f"{path}, row {number},", asked.category)
        return asked

    def wording(self, asked: Question) -> str:
        """The question as lmms-eval asks it."""
        return super().wording(asked).replace(ASKED, "")

    def official(self, predictions: list[tuple[Question, str]], folder: Path) -> None:
        """Write CATEGORY.txt for eval_tool/calculation.py, with the two lines of a picture next to each other."""
        for category, several in by_category(predictions).items():
            pairs: dict[str, list[str]] = {}
            for asked, prediction in several:
                name = Path(str(asked.row.get("image_path") or asked.key)).name
                fields = (name, asked.text, str(asked.answer), prediction)
                pairs.setdefault(name, []).append("\t".join(" ".join(field.split()) for field in fields))
            lines = [line for pair in pairs.values() for line in pair]
            (folder / f"{category}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
