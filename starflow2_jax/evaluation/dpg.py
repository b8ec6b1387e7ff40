"""DPG-Bench: long, dense prompts, judged by questions to mPLUG-large (github.com/TencentQQGYLab/ELLA)."""

from pathlib import Path

from PIL import Image as Pillow

from starflow2_jax.data.documents import Text
from starflow2_jax.evaluation.drawing import Asked, Drawing
from starflow2_jax.evaluation.protocol import Answer
from starflow2_jax.evaluation.user_files import Needed, facts, picture_of
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.text_files import read_text_file

NEEDED = Needed("dpg", "the folder dpg_bench/prompts", "https://github.com/TencentQQGYLab/ELLA")
SIDE = 2  # pictures in a row and in a column of the grid


class DpgBenchmark(Drawing):
    """Four pictures for each text file, in one file of the same name. Raises UserError for a folder of another kind."""

    samples = SIDE * SIDE

    def __init__(self, data: str | None = None, limit: int | None = None):
        folder, self.limit = NEEDED.path(data), limit
        files = sorted(folder.glob("*.txt"))
        if not files:
            NEEDED.refuse(folder, "is no folder of .txt files")
        self.asked = [Asked(file.stem, [Text(read_text_file(file).strip())]) for file in files]
        self.facts = facts(folder)

    def begin(self, sampler: Sampler) -> None:
        """Take the size of the tiles from the model. Raises UserError for pictures that are not square."""
        super().begin(sampler)
        height, width, _ = sampler.codec.image_shape
        if height != width:
            NEEDED.refuse("this checkpoint", f"draws {height} x {width} pixels, and the scorer cuts square tiles")
        self.facts = {**self.facts, "resolution": width}

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write the grids, 2 x 2, into the folder dpg; it holds nothing else, because the scorer opens every file
        there.

        The scorer's --resolution is the side of a tile. It stands in dpg_resolution.txt and in run.json.
        """
        folder = out / "dpg"
        folder.mkdir()
        (out / "dpg_resolution.txt").write_text(f"{self.facts['resolution']}\n", encoding="utf-8")
        for start in range(0, len(answers), self.samples):
            tiles = answers[start : start + self.samples]
            _grid([picture_of(answer) for answer in tiles]).save(folder / f"{tiles[0].task.key}.png")


def _grid(files: list[Path]) -> Pillow.Image:
    """Four pictures of one size -> one picture: 0 and 1 in the first row, 2 and 3 in the second."""
    pictures = [Pillow.open(file).convert("RGB") for file in files]
    width, height = pictures[0].size
    grid = Pillow.new("RGB", (SIDE * width, SIDE * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % SIDE * width, i // SIDE * height))
    return grid
