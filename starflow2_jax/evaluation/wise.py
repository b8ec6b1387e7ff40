"""WISE and WISE_Verified: prompts that need knowledge of the world (github.com/PKU-YuanGroup/WISE)."""

from pathlib import Path

from starflow2_jax.data.documents import Text
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.drawing import Asked, Drawing
from starflow2_jax.evaluation.protocol import Answer
from starflow2_jax.evaluation.user_files import Needed, facts, picture_of, place
from starflow2_jax.text_files import read_json_file

NEEDED = Needed(
    "wise",
    "the folder data_verified (WISE_Verified) or WISE_legacy/data (WISE), or one of their .json files",
    "https://github.com/PKU-YuanGroup/WISE",
)
REWRITTEN = "_rewrite"  # in the names of files whose prompts say plainly what is meant


class WiseBenchmark(Drawing):
    """A picture for each prompt of a file, or of the files of a folder: all but those with rewritten and merged
    prompts.

    To draw rewritten prompts, name their file. Raises UserError for files of another kind.
    """

    def __init__(self, data: str | None = None, limit: int | None = None):
        path, self.limit = NEEDED.path(data), limit
        files = [path]
        if path.is_dir():
            files = [f for f in sorted(path.glob("*.json")) if REWRITTEN not in f.stem and f.stem != "merge"]
        rows = [(file, row) for file in files for row in _rows(file)]
        if not rows:
            NEEDED.refuse(path, "holds no prompts")
        for file, row in rows:
            NEEDED.require(f"a prompt in {file}", row, ("Prompt", "prompt_id"))
        numbers = [NEEDED.whole(f"a prompt_id in {file}", row["prompt_id"]) for file, row in rows]
        if len(set(numbers)) < len(numbers):
            raise UserError(
                f"two prompts in {path} have the same prompt_id; give the files of only one version of WISE"
            )
        asked = [Asked(str(n), [Text(str(row["Prompt"]))]) for n, (_, row) in zip(numbers, rows, strict=True)]
        self.asked = sorted(asked, key=lambda each: int(each.key))
        self.facts = facts(path, any(REWRITTEN in file.stem for file in files))

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write the pictures as PROMPT_ID.png into the folder wise."""
        for answer in answers:
            place(picture_of(answer), out / "wise" / f"{answer.task.key}.png")


def _rows(file: Path) -> list:
    value = read_json_file(file)
    if not isinstance(value, list):
        NEEDED.refuse(file, "is no list of prompts")
    return value
