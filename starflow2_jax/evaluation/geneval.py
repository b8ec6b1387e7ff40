"""GenEval: a detector checks objects in a picture, their number, colour and place (github.com/djghosh13/geneval)."""

import json
import re
from pathlib import Path

from starflow2_jax.data.documents import Text
from starflow2_jax.errors import shown
from starflow2_jax.evaluation.drawing import Asked, Drawing
from starflow2_jax.evaluation.protocol import Answer
from starflow2_jax.evaluation.user_files import Needed, facts, picture_of, place
from starflow2_jax.text_files import parse_json, read_lines

NEEDED = Needed("geneval", "evaluation_metadata.jsonl", "https://github.com/djghosh13/geneval (folder prompts)")
RAW = re.compile(r"a photo of [\w ]{1,60}")  # all 553 prompts of the benchmark; rewritten ones are longer sentences


class GenevalBenchmark(Drawing):
    """Four pictures for each line of the metadata file. Those of rewritten prompts get a folder of another name.

    Raises UserError for a file of another kind.
    """

    samples = 4

    def __init__(self, data: str | None = None, limit: int | None = None):
        path, self.limit = NEEDED.file(data), limit
        self.asked = []
        for i, line in enumerate(read_lines(path)):
            where = f"{path}, line {i + 1},"
            row = NEEDED.require(where, parse_json(where, line, one_line=True), ("tag", "include", "prompt"))
            if not isinstance(row["prompt"], str):
                NEEDED.refuse(where, f"has {shown(row['prompt'])} in place of a prompt")
            self.asked.append(Asked(f"{i:05d}", [Text(row["prompt"])], row))
        if not self.asked:
            NEEDED.refuse(path, "holds no prompts")
        self.rewritten = not all(RAW.fullmatch(each.target["prompt"]) for each in self.asked)
        self.facts = facts(path, self.rewritten)

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write NNNNN/metadata.jsonl, one object, and NNNNN/samples/KKKKK.png for prompt N and picture K."""
        folder = out / ("geneval_rewritten" if self.rewritten else "geneval")
        for answer in answers:
            here = folder / answer.task.key
            place(picture_of(answer), here / "samples" / f"{answer.k:05d}.png")
            (here / "metadata.jsonl").write_text(json.dumps(answer.task.target), encoding="utf-8")
