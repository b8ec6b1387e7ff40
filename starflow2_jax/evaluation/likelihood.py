"""Exact likelihoods of documents, by source, and of captions and pictures that belong together, as in Winoground."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from tqdm import tqdm

from starflow2_jax.data.documents import Document, DocumentError, Image, StoredImage
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.rows import picture
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Task
from starflow2_jax.evaluation.scenes import noisy
from starflow2_jax.evaluation.user_files import Needed, facts
from starflow2_jax.random_streams import stream_seed
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import BATCH, describe, illustrate, score
from starflow2_jax.text_files import parse_json, read_lines

NEEDED = Needed(
    "likelihood",
    'a .jsonl file, or a folder of them (one for each source), of documents with parts marked "predict" or "generate", or of '
    '{"captions": [...], "images": [...]} that belong together in their order',
    "your own data (docs/evaluation.md)",
)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Captions and pictures; caption i belongs to picture i."""

    captions: list[str]
    images: list[StoredImage]


class LikelihoodBenchmark(Benchmark):
    """Documents and pairs of the user's files. It draws nothing: all of its work is in `export`.

    Pictures get the noise of the training, drawn from their source and place. Raises UserError for other files.
    """

    def __init__(self, data: str | None = None, limit: int | None = None):
        path = NEEDED.path(data)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            NEEDED.refuse(path, "is a folder without .jsonl files")
        self.sources = {file.stem: _records(file, limit) for file in files}
        self.facts = facts(path)

    def begin(self, sampler: Sampler) -> None:
        """Keep the model, which scores when the results are exported."""
        self.sampler = sampler

    def tasks(self) -> list[Task]:
        """None."""
        return []

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write SOURCE.jsonl with the likelihoods of each document, or those of each pair of captions and pictures."""
        self.found: dict[str, list[dict]] = {}
        folder = out / "likelihood"
        folder.mkdir()
        for source, records in self.sources.items():
            if isinstance(records, list):
                scored = _score_pairs(self.sampler, source, records)
            else:
                scored = _score_documents(self.sampler, source, records)
            rows = list(tqdm(scored, total=len(records), desc=source, unit="document"))
            (folder / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            self.found[source] = rows

    def score(self, answers: list[Answer], sampler: Sampler) -> dict[str, float | None]:
        """The numbers of each source. Those of a single source have no name of the source in front."""
        numbers = {}
        for source, rows in self.found.items():
            found = ranking(rows) if "image_given_caption" in rows[0] else density(rows)
            prefix = f"{source}_" if len(self.found) > 1 else ""
            numbers |= {f"{prefix}{name}": value for name, value in found.items()}
        return numbers


def density(rows: list[dict]) -> dict[str, float | None]:
    """Nats and bits per dimension of all images, and per token of all texts; nats of a document.

    rows: {"image_nats", "image_dims", "image_bits", "text_nats", "text_tokens"} of each document: log-likelihoods, their
    numbers, and the negative log2-likelihood of 8-bit images.
    """
    total = {name: math.fsum(row[name] for row in rows) for name in rows[0]}
    numbers: dict[str, float | None] = {
        "nll_nats_per_document": -(total["image_nats"] + total["text_nats"]) / len(rows)
    }
    if total["image_dims"]:
        numbers["image_nll_nats_per_dim"] = -total["image_nats"] / total["image_dims"]
        numbers["image_nll_bits_per_dim"] = total["image_bits"] / total["image_dims"]
    if total["text_tokens"]:
        numbers["text_nll_nats_per_token"] = -total["text_nats"] / total["text_tokens"]
        numbers["text_nll_bits_per_token"] = numbers["text_nll_nats_per_token"] / math.log(2)
    return numbers


def ranking(rows: list[dict]) -> dict[str, float | None]:
    """Winoground's scores: the share of groups in which each picture finds its caption (text_score), each caption its
    picture (image_score), and both (group_score).

    rows: {"image_given_caption": log p (images, captions), "image": log p (images,) without a caption,
    "caption_given_image": log p (images, captions)}. The ending "_by_image" says that pictures were scored given captions,
    "_by_text" that captions were scored given pictures. A caption chooses among pictures by how much it raises their
    likelihood, because plain pictures are likely under any caption.
    """
    found: dict[str, list[bool]] = {}
    for row in rows:
        given = np.array(row["image_given_caption"])
        own = np.arange(len(given))
        for way, finds_caption, finds_image in (
            ("by_image", given, given - np.array(row["image"])[:, None]),
            ("by_text", *[np.array(row["caption_given_image"])] * 2),
        ):
            text, image = (finds_caption.argmax(1) == own).all(), (finds_image.argmax(0) == own).all()
            for name, right in (("text_score", text), ("image_score", image), ("group_score", text and image)):
                found.setdefault(f"{name}_{way}", []).append(bool(right))
    return {name: float(np.mean(values)) for name, values in found.items()}


@dataclass(frozen=True, eq=False)
class Documents:
    """The first documents of a file."""

    file: JsonlDocuments
    count: int

    def __len__(self) -> int:
        return self.count


def _records(file: Path, limit: int | None) -> Documents | list[Pairs]:
    """The documents, or the captions and pictures, in a file. Raises UserError."""
    lines = read_lines(file)
    first = parse_json(f"{file}, line 1,", lines[0], one_line=True) if lines else None
    if not (isinstance(first, dict) and "captions" in first):
        documents = JsonlDocuments(str(file))
        return Documents(documents, min(len(documents), limit or len(documents)))
    return [_pairs(f"{file}, line {i},", line, file.parent) for i, line in enumerate(lines[:limit], 1)]


def _pairs(where: str, line: str, folder: Path) -> Pairs:
    row = NEEDED.require(where, parse_json(where, line, one_line=True), ("captions", "images"))
    captions, images = row["captions"], row["images"]
    if not (isinstance(captions, list) and isinstance(images, list) and len(captions) == len(images) > 1):
        NEEDED.refuse(where, "has no lists of captions and images of one length, at least 2")
    try:
        return Pairs(
            [str(text) for text in captions], [picture(each, epath.Path(folder), generate=True) for each in images]
        )
    except DocumentError as error:
        NEEDED.refuse(where, f"names a picture that cannot be used ({error})")


def _score_documents(sampler: Sampler, source: str, documents: Documents) -> Iterator[dict]:
    """The row of each document, for `density`. Raises DocumentError."""
    read = _reader(sampler)
    for start in range(0, len(documents), BATCH):
        several = range(start, min(start + BATCH, len(documents)))
        shown = [_noisy(sampler, documents.file.read(i, read), source, i) for i in several]
        for parts in score(sampler, shown):
            images, texts = ([part for part in parts if bool(part.dims) == kind] for kind in (True, False))
            yield {
                "image_nats": math.fsum(part.nats for part in images),
                "image_dims": sum(part.dims for part in images),
                "image_bits": math.fsum(part.bits_per_dim * part.dims for part in images),
                "text_nats": math.fsum(part.nats for part in texts),
                "text_tokens": sum(len(part.tokens) for part in texts),
            }


def _score_pairs(sampler: Sampler, source: str, several: list[Pairs]) -> Iterator[dict]:
    """The row of each group of captions and pictures, for `ranking`. Raises DocumentError."""
    read = _reader(sampler)
    for i, pairs in enumerate(several):
        seen: Document = [read(image) for image in pairs.images]
        drawn = [part.pixels for part in _noisy(sampler, seen, source, i) if isinstance(part, Image)]
        shown = [part.pixels for part in seen if isinstance(part, Image)]
        documents = [
            *(illustrate(caption, each) for each in drawn for caption in pairs.captions),
            *(describe(caption, each) for each in shown for caption in pairs.captions),
            *(illustrate("", each) for each in drawn),
        ]
        nats = np.array([math.fsum(part.nats for part in parts) for parts in score(sampler, documents)])
        given, told, alone = np.split(nats, [(n := len(seen)) ** 2, 2 * n**2])
        yield {
            "image_given_caption": given.reshape(n, n).tolist(),
            "caption_given_image": told.reshape(n, n).tolist(),
            "image": alone.tolist(),
        }


def _reader(sampler: Sampler) -> ImageReader:
    codec = sampler.codec
    return ImageReader(codec.image_channels, codec.image_shape[:2], not codec.is_pixels)


def _noisy(sampler: Sampler, document: Document, source: str, i: int) -> Document:
    """The document with the noise of the training on the images that count, the same in every run."""
    return noisy(document, sampler.noise, np.random.default_rng(stream_seed(0, "likelihood", source, str(i))))
