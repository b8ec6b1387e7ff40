"""MMBench, SEED-Bench and AI2D: questions with choices."""

import json
from pathlib import Path

from starflow2_jax.evaluation.questions import Question, Questions, copies, letter


class MmbenchBenchmark(Questions):
    """MMBench (github.com/open-compass/MMBench). Its server and VLMEvalKit read the table predictions.tsv."""

    needed = copies("mmbench", "MMBench", "MMBench_DEV_EN", "folder en")
    split = "dev"
    template = "{hint}{question} There are several options:\n{choices}\n{ask}"


class SeedBenchmark(Questions):
    """SEED-Bench (github.com/AILab-CVC/SEED-Bench)."""

    needed = copies("seed", "SEED-Bench", "SEEDBench_IMG")

    def official(self, predictions: list[tuple[Question, str]], folder: Path) -> None:
        """Write results.json for the leaderboard: a line of JSON for each question."""
        lines = [
            {"question_id": asked.row.get("question_id", asked.key), "prediction": letter(said, asked.choices) or said}
            for asked, said in predictions
        ]
        (folder / "results.json").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Ai2dBenchmark(Questions):
    """AI2D: diagrams of school books. VLMEvalKit reads the table predictions.tsv."""

    needed = copies("ai2d", "ai2d", "AI2D_TEST")
