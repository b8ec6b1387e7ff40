"""The tiny experiment with held-out documents: a JSONL file of digits that no stage reads, its losses, and a sample
sheet.
"""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict
from tiny_experiment import tiny_config

from starflow2_jax.data import digits
from starflow2_jax.data.documents import Document, Text
from starflow2_jax.data.images import write_image

COUNT = 11  # documents, of three kinds: they fill no whole number of rows and groups


def documents() -> list[Document]:
    pixels, labels = digits.split("held_out")
    makers = (
        lambda i: digits.caption(int(labels[i]), pixels[i], i),
        lambda i: digits.read(int(labels[i]), pixels[i], i),
        lambda i: digits.count(2, [pixels[i], pixels[i + 1]], i),
    )
    return [makers[i % 3](i) for i in range(COUNT)]


def write(folder: Path) -> str:
    """Writes the documents; returns the file's path."""
    lines = []
    for i, document in enumerate(documents()):
        parts = []
        for k, part in enumerate(document):
            if isinstance(part, Text):
                parts.append({"text": part.text, "predict": part.predict})
            else:
                write_image(folder / f"{i}_{k}", part.pixels)
                parts.append({"image": f"{i}_{k}.png", "generate": part.generate})
        lines.append(json.dumps(parts))
    (folder / "held_out.jsonl").write_text("\n".join(lines))
    return str(folder / "held_out.jsonl")


def config(held_out: str, **changes) -> ConfigDict:
    """Held-out losses every two steps, and a sheet every four."""
    c = tiny_config(log_every=1, save_every=3, noise=0.0)
    c.data.groups = 4
    c.data.sources.update(
        mine=dict(path=held_out, crop="random", flip=True), other=dict(path="digits", part="held_out")
    )
    c.evals = dict(
        val=dict(mix=dict(mine=3.0, other=1.0), every=2, batches=8),
        sheet=dict(prompts=("draw a seven", held_out), every=4, samples=2),
    )
    c.stages.joint.update(steps=5, ema=0.5)
    c.evals = changes.pop("evals", c.evals)
    c.update(changes)
    return c


def get_config(runlocal: bool = False) -> ConfigDict:
    """What `starflow2 train --config` reads, on the documents that the variable HELD_OUT names."""
    return config(os.environ["HELD_OUT"], mesh=dict(data=-1, fsdp=1, sequence=1, tensor=1))
