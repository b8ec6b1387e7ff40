"""GEdit-Bench and ImgEdit-Bench: a picture and an instruction go in, and the changed picture comes out."""

from pathlib import Path

from etils import epath

from starflow2_jax.data.documents import Text
from starflow2_jax.data.images import locate, opened, stored
from starflow2_jax.data.pictures import Picture
from starflow2_jax.errors import shown
from starflow2_jax.evaluation import tables
from starflow2_jax.evaluation.drawing import Asked, Drawing
from starflow2_jax.evaluation.protocol import Answer
from starflow2_jax.evaluation.user_files import Needed, facts, picture_of, place
from starflow2_jax.text_files import read_json_file

MODEL = "starflow2"  # folder of the pictures; the scorer's --model_name


class GeditBenchmark(Drawing):
    """GEdit-Bench (github.com/stepfun-ai/Step1X-Edit). Raises UserError for a table of another kind.

    The instruction's picture is cropped to the model's size, as in training; the scorer compares with the whole one.
    """

    needed = Needed(
        "gedit", "the data set stepfun-ai/GEdit-Bench", "https://huggingface.co/datasets/stepfun-ai/GEdit-Bench"
    )

    def __init__(self, data: str | None = None, limit: int | None = None):
        path, self.limit = self.needed.path(data), limit
        self.asked = []
        for i, row in enumerate(tables.read(self.needed, path, "train")):
            where = f"{path}, row {i},"
            self.needed.require(where, row, ("task_type", "key", "instruction", "instruction_language", "input_image"))
            name = "/".join(
                self.needed.file_name(where, row[part]) for part in ("task_type", "instruction_language", "key")
            )
            source = tables.pictures({"image": row["input_image"]}, path)[1]
            self.asked.append(Asked(name, [source, Text(str(row["instruction"]))], source))
        self.facts = facts(path)

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write gedit/starflow2/fullset/TASK/LANGUAGE/KEY.png, and the picture that was given as KEY_SRCIMG.png."""
        for answer in answers:
            target = out / "gedit" / MODEL / "fullset" / f"{answer.task.key}.png"
            place(picture_of(answer), target)
            with opened(answer.task.target) as file:
                Picture(file).opaque(3).save(target.with_name(f"{target.stem}_SRCIMG.png"))


class ImgeditBenchmark(Drawing):
    """ImgEdit-Bench, basic and UGE (github.com/PKU-YuanGroup/ImgEdit). Raises UserError for a file of another kind."""

    needed = Needed(
        "imgedit",
        "basic_edit.json or UGE_edit.json, put into the folder of the pictures of Benchmark.tar",
        "https://github.com/PKU-YuanGroup/ImgEdit (folder Benchmark) and huggingface.co/datasets/sysuyy/ImgEdit",
    )

    def __init__(self, data: str | None = None, limit: int | None = None):
        path, self.limit = self.needed.file(data), limit
        rows = self.needed.require(path, read_json_file(path), ())
        if not rows:
            self.needed.refuse(path, "holds no prompts")
        self.asked = []
        for key, row in rows.items():
            where = f"{path}, entry {shown(key)},"
            self.needed.require(where, row, ("id", "prompt"))
            for part in key.split("/"):
                self.needed.file_name(where, part)
            file = locate(str(row["id"]), epath.Path(path.parent))
            if not file.exists():
                self.needed.refuse(path, f"names the picture {file}, which does not exist")
            self.asked.append(Asked(key, [stored(file), Text(str(row["prompt"]))]))
        self.facts = facts(path)

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write KEY.png into the folder imgedit."""
        for answer in answers:
            place(picture_of(answer), out / "imgedit" / f"{answer.task.key}.png")
