"""GQA: questions about the things in a picture and how they relate (cs.stanford.edu/people/dorarad/gqa)."""

import json
from pathlib import Path

from starflow2_jax.evaluation import tables
from starflow2_jax.evaluation.questions import Question, Questions, copies
from starflow2_jax.evaluation.tables import Row

TIER = "testdev_balanced"


class GqaBenchmark(Questions):
    """The balanced questions of GQA's split testdev."""

    needed = copies("gqa", "GQA", "GQA_TestDev_Balanced", f"folders {TIER}_instructions and {TIER}_images")
    split = "testdev"

    def rows(self, path: Path) -> list[Row]:
        """The questions with the pictures of the second table."""
        folders = [path / f"{TIER}_{part}" for part in ("instructions", "images")]
        if not all(folder.is_dir() for folder in folders):
            return super().rows(path)
        self.parts = (self.split,)  # the folders of others have other names
        asked, seen = (tables.read(self.needed, folder, self.split) for folder in folders)
        for folder, rows, names in zip(folders, (asked, seen), (("imageId",), ("id", "image")), strict=True):
            for i, row in enumerate(rows):
                self.needed.require(f"{folder}, row {i},", row, names)
        images = {row["id"]: row["image"] for row in seen}
        if missing := [row["imageId"] for row in asked if row["imageId"] not in images]:
            self.needed.refuse(folders[1], f"lacks the picture {missing[0]}")
        return [{**row, "image": images[row["imageId"]]} for row in asked]

    def official(self, predictions: list[tuple[Question, str]], folder: Path) -> None:
        """Write testdev_balanced_predictions.json for eval.py, which compares words in small letters."""
        rows = [{"questionId": asked.key, "prediction": said.rstrip(".").lower()} for asked, said in predictions]
        (folder / f"{TIER}_predictions.json").write_text(json.dumps(rows), encoding="utf-8")
