"""Pictures of captions, such as COCO's, for a Fréchet distance: a flat folder, and the list of captions."""

import hashlib
import json
import re
from pathlib import Path

from starflow2_jax.data.documents import Text
from starflow2_jax.errors import shown
from starflow2_jax.evaluation.drawing import Asked, Drawing
from starflow2_jax.evaluation.protocol import Answer
from starflow2_jax.evaluation.user_files import Needed, facts, picture_of, place
from starflow2_jax.text_files import parse_json, read_text_file

NEEDED = Needed(
    "coco",
    "captions_val2014.json, or a text file of captions, one per line",
    "https://cocodataset.org (2014 Train/Val annotations)",
)
JSON = re.compile(r"\s*(\{|\[\s*[\[{\"])")  # how an object, or a list of lists, objects or texts begins


class CocoBenchmark(Drawing):
    """A picture for each caption. Raises UserError for a file of another kind.

    Of COCO's file, each image gives its caption of the lowest id, and the images come in the order of a hash of their
    ids: so the first N are a random sample, and the same one everywhere.
    """

    def __init__(self, data: str | None = None, limit: int | None = None):
        path, self.limit = NEEDED.file(data), limit
        text = read_text_file(path)
        captions = _annotated(path, text) if JSON.match(text) else _lines(text)
        if not captions:
            NEEDED.refuse(path, "holds no captions")
        self.asked = [Asked(key, [Text(caption)], caption) for key, caption in captions.items()]
        used = "\n".join(each.target for each in self.asked[:limit])
        self.facts = facts(path) | {"captions_sha256": hashlib.sha256(used.encode()).hexdigest()}

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write the pictures into the folder coco, and their captions into coco_captions.jsonl."""
        for answer in answers:
            place(picture_of(answer), out / "coco" / f"{answer.task.key}.png")
        lines = [{"file": f"{answer.task.key}.png", "caption": answer.task.target} for answer in answers]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (out / "coco_captions.jsonl").write_text(text, encoding="utf-8")


def _lines(text: str) -> dict[str, str]:
    captions = [line.strip() for line in text.split("\n") if line.strip()]
    return {f"{i:06d}": caption for i, caption in enumerate(captions)}


def _annotated(path: Path, text: str) -> dict[str, str]:
    """The first caption of each image of COCO's annotations."""
    where = f"an annotation in {path}"
    rows = NEEDED.require(path, parse_json(path, text), ("annotations",))["annotations"]
    if not isinstance(rows, list):
        NEEDED.refuse(path, f"has {shown(rows)} in place of a list of annotations")
    first: dict[int, tuple[int, str]] = {}
    for row in rows:
        NEEDED.require(where, row, ("image_id", "id", "caption"))
        image, number = (NEEDED.whole(where, row[name]) for name in ("image_id", "id"))
        found = number, " ".join(str(row["caption"]).split())
        first[image] = min(first.get(image, found), found)
    images = sorted(first, key=lambda image: hashlib.sha256(str(image).encode()).digest())
    return {f"{image:012d}": first[image][1] for image in images}
