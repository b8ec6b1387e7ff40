"""Sample sheets: images of fixed prompts and seeds, drawn with the moving average of the parameters, as a PNG file."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.images import ImageReader, as_pillow
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.pipeline import Encoder
from starflow2_jax.errors import ConfigError, shown
from starflow2_jax.parallel import processes, sharding
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import spoken
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.training.evals.protocol import Findings
from starflow2_jax.training.stage_task import StageTask
from starflow2_jax.training.step import TrainState

LEAST = 64  # pixels of an image's shorter side on the sheet; smaller ones are enlarged
LINE = 16  # pixels of a line of text, and of the margins


class Sheet:
    """See protocol.Evaluator. Writes evals/NAME/STEP.png: a row for each prompt, a column for each seed."""

    def __init__(self, name: str, config: Any, task: StageTask, folder: Path):
        self.name, self.config, self.task = name, config, task
        self.folder = folder / "evals" / name
        self.prompts = [document for text in config.prompts for document in self._read(text)]
        if not self.prompts:
            raise ConfigError(f"evals.{name}.prompts is empty; give at least one text")
        self._require_room()

    def _require_room(self) -> None:
        encoder = Encoder(self.task.tokenizer, self.task.codec, self.task.model.cfg.vlm.vision)
        most, image = self.task.config.max_positions, self.task.model.cfg.tokens + 2
        for prompt in self.prompts:
            if (length := len(encoder(prompt, closed=False)["tokens"]) + image) > most:
                raise ConfigError(
                    f"evals.{self.name}: the prompt {shown(caption(prompt))} and an image need {length} positions; set "
                    f"max_positions, which is {most}, to at least that, or shorten the prompt"
                )

    def _read(self, prompt: str) -> list[Document]:
        """A text, or the documents of a .jsonl file."""
        if not prompt.endswith(".jsonl"):
            return [spoken(self.task.tokenizer, prompt)]
        height, width, channels = self.task.codec.image_shape
        source, reader = JsonlDocuments(prompt), ImageReader(channels, (height, width))
        return [source.read(i, reader) for i in range(len(source))]

    def __call__(self, number: int, state: TrainState, frozen: dict[str, Any]) -> Findings:
        """See protocol.Evaluator."""
        params, mesh = frozen | state.params | state.ema, self.task.mesh
        params.pop("codec", None)  # the sampler has the whole codec
        if jax.process_count() > 1:  # the sampler runs in one process, on the devices of process 0
            params = multihost_utils.process_allgather(params, tiled=True)
            if not processes.primary():
                return Findings()
            mesh = sharding.make_mesh(devices=jax.local_devices(), fsdp=jax.local_device_count(), data=1)
            params = jax.device_put(params, sharding.tree_shardings(params, mesh))
        with jax.set_mesh(mesh):  # in place of the run's, which has devices of other processes
            images = self._images(params, mesh)
        picture = drawn([caption(prompt) for prompt in self.prompts], images)
        if processes.primary():
            self.folder.mkdir(parents=True, exist_ok=True)
            picture.save(self.folder / f"{number:08d}.png")
        return Findings(pictures={"samples": np.asarray(picture)})

    def _images(self, params: dict[str, Any], mesh: jax.sharding.Mesh) -> list[list[np.ndarray]]:
        """The images (height, width, C) of each prompt."""
        task, c = self.task, self.config
        sampler = Sampler(
            task.model, params, task.tokenizer, task.codec, task.stage.skips, task.config.max_positions, mesh
        )
        options = SampleOptions(
            image_temperature=c.image_temperature,
            guidance=c.guidance,
            max_tokens=task.model.cfg.tokens + 1,
            image_first=True,
        )
        seeds = [c.seed + k for k in range(c.samples)]
        answers = sampler.generate(self.prompts, options, seeds * len(self.prompts), c.samples)
        images = [next(part.pixels for part in answer if isinstance(part, Image)) for answer in answers]
        return [images[i : i + c.samples] for i in range(0, len(images), c.samples)]


def caption(prompt: Document) -> str:
    """The texts of a prompt on one line."""
    return " ".join(part.text.strip() if isinstance(part, Text) else "(image)" for part in prompt)


def drawn(captions: list[str], rows: list[list[np.ndarray]]) -> Pillow.Image:
    """Rows of pictures (height, width, C) in [-1, 1], each below its caption."""
    height, width, _ = rows[0][0].shape
    scale = -(-LEAST // min(height, width))
    height, width = height * scale, width * scale
    columns = len(rows[0])
    sheet = Pillow.new("RGB", (columns * (width + LINE) + LINE, len(rows) * (height + 2 * LINE) + LINE), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=LINE - 4)
    for i, (text, row) in enumerate(zip(captions, rows, strict=True)):
        top = LINE + i * (height + 2 * LINE)
        draw.text((LINE, top - LINE // 2), text, "black", font)
        for k, pixels in enumerate(row):
            image = as_pillow(pixels).resize((width, height), Pillow.Resampling.NEAREST)
            sheet.paste(image, (LINE + k * (width + LINE), top + LINE))
    return sheet
