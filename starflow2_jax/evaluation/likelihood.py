"""Exact likelihoods of documents, by source, and of captions and pictures that belong together, as in Winoground."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from starflow2_jax.data.documents import Document, DocumentError, Image, StoredImage, Text
from starflow2_jax.data.jsonl import JsonlDocuments
from starflow2_jax.data.rows import picture
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Items, Scores, Task
from starflow2_jax.evaluation.scenes import noisy
from starflow2_jax.evaluation.user_files import Needed, facts
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.sampling.scoring import Score, describe, illustrate, score
from starflow2_jax.text_files import parse_json, read_lines

NEEDED = Needed(
    "likelihood",
    'a .jsonl file, or a folder of them (one for each source), of documents with parts marked "predict" or "generate", '
    'or of {"captions": [...], "images": [...]} that belong together in their order',
    "your own data (docs/evaluation.md)",
)
DOCUMENT, PAIRS = "document", "pairs"  # targets of the tasks
DENSITIES = (
    "nll_nats_per_document",
    *("image_nll_nats_per_dim", "image_nll_bits_per_dim"),
    *("text_nll_nats_per_token", "text_nll_bits_per_token"),
)
Row = dict[str, Any]


class LikelihoodBenchmark(Benchmark):
    """Documents and pairs of the user's files, which are scored and not answered: an answer is a row of numbers as
    JSON.

    Pictures that count get the noise of the training, drawn with the answer's seed. Raises UserError for other files.
    """

    def __init__(self, data: str | None = None, limit: int | None = None):
        path = NEEDED.path(data)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            NEEDED.refuse(path, "is a folder without .jsonl files")
        self.asked = [task for file in files for task in _tasks(file, limit)]
        self.facts = facts(path)

    def tasks(self) -> list[Task]:
        """The documents, and the pictures and captions that belong together, by source."""
        return self.asked

    def answer(
        self,
        sampler: Sampler,
        tasks: list[Task],
        prompts: list[Document],
        options: SampleOptions,
        seeds: list[int],
        rows: int,
    ) -> list[Document]:
        """The row of each task, for `density` or for `ranking`. Raises DocumentError with the index of the task."""
        asked = []
        for task, prompt, seed in zip(tasks, prompts, seeds, strict=True):
            drawn = noisy(prompt, sampler.noise, np.random.default_rng(seed))
            asked.append(_combinations(prompt, drawn) if task.target == PAIRS else [drawn])
        owners = [i for i, documents in enumerate(asked) for _ in documents]
        try:
            scores = iter(score(sampler, [document for documents in asked for document in documents]))
        except DocumentError as error:
            if error.index is None:
                raise
            fault = str(error).removeprefix(f"document {error.index}: ")
            raise DocumentError(fault, owners[error.index]) from None
        answers: list[Document] = []
        for task, documents in zip(tasks, asked, strict=True):
            found = [next(scores) for _ in documents]
            row = _pairs_row(found) if task.target == PAIRS else _document_row(found[0])
            answers.append([Text(json.dumps(row))])
        return answers

    def export(self, answers: list[Answer], out: Path) -> None:
        """Write SOURCE.jsonl: a JSON object for each document, or for each group of captions and pictures."""
        folder = out / "likelihood"
        folder.mkdir()
        for source, rows in _by_source(answers).items():
            text = "".join(json.dumps(row) + "\n" for row in rows.values())
            (folder / f"{source}.jsonl").write_text(text, encoding="utf-8")

    def score(self, answers: list[Answer], sampler: Sampler) -> Scores:
        """The numbers of each source. Those of a single source have no name of the source in front."""
        numbers: dict[str, Items] = {}
        sources = _by_source(answers)
        for source, rows in sources.items():
            found = ranking(rows) if "image_given_caption" in next(iter(rows.values())) else density(rows)
            prefix = f"{source}_" if len(sources) > 1 else ""
            numbers |= {f"{prefix}{name}": items for name, items in found.items()}
        return numbers


def _by_source(answers: list[Answer]) -> dict[str, dict[str, Row]]:
    """The rows of each source by the tasks' keys."""
    found: dict[str, dict[str, Row]] = {}
    for answer in answers:
        [part] = answer.document
        assert isinstance(part, Text)
        found.setdefault(answer.task.key.rpartition("/")[0], {})[answer.task.key] = json.loads(part.text)
    return found


def density(rows: Mapping[str, Row]) -> dict[str, Items]:
    """Nats and bits per dimension of all images, and per token of all texts; nats of a document.

    rows: {"image_nats", "image_dims", "image_bits", "text_nats", "text_tokens"} of each document: log-likelihoods,
    their numbers, and the negative log2-likelihood of 8-bit images.
    """
    found: dict[str, Items] = {name: {} for name in DENSITIES}
    for key, row in rows.items():
        found["nll_nats_per_document"][key] = (-(row["image_nats"] + row["text_nats"]), 1.0)
        if dims := row["image_dims"]:
            found["image_nll_nats_per_dim"][key] = (-row["image_nats"] / dims, dims)
            found["image_nll_bits_per_dim"][key] = (row["image_bits"] / dims, dims)
        if tokens := row["text_tokens"]:
            found["text_nll_nats_per_token"][key] = (-row["text_nats"] / tokens, tokens)
            found["text_nll_bits_per_token"][key] = (-row["text_nats"] / tokens / math.log(2), tokens)
    return {name: items for name, items in found.items() if items}


def ranking(rows: Mapping[str, Row]) -> dict[str, Items]:
    """Winoground's scores: whether each picture of a group finds its caption (text_score), each caption its picture
    (image_score), and both (group_score).

    rows: {"image_given_caption": log p (images, captions), "image": log p (images,) without a caption,
    "caption_given_image": log p (images, captions)}. The ending "_by_image" says that pictures were scored given
    captions, "_by_text" that captions were scored given pictures. A caption chooses among pictures by how much it
    raises their likelihood, because plain pictures are likely under any caption.
    """
    found: dict[str, Items] = {}
    for key, row in rows.items():
        given = np.array(row["image_given_caption"])
        own = np.arange(len(given))
        for way, finds_caption, finds_image in (
            ("by_image", given, given - np.array(row["image"])[:, None]),
            ("by_text", *[np.array(row["caption_given_image"])] * 2),
        ):
            text, image = (finds_caption.argmax(1) == own).all(), (finds_image.argmax(0) == own).all()
            for name, right in (("text_score", text), ("image_score", image), ("group_score", text and image)):
                found.setdefault(f"{name}_{way}", {})[key] = (float(right), 1.0)
    return found


def _tasks(file: Path, limit: int | None) -> list[Task]:
    """The documents, or the captions and pictures, in a file. Raises UserError."""
    lines = read_lines(file)
    first = parse_json(f"{file}, line 1,", lines[0], one_line=True) if lines else None
    if isinstance(first, dict) and "captions" in first:
        found = [(_pairs(f"{file}, line {i},", line, file.parent), PAIRS) for i, line in enumerate(lines[:limit], 1)]
    else:
        documents = JsonlDocuments(str(file))
        count = min(len(documents), limit or len(documents))
        found = [(documents.read(i, _unread), DOCUMENT) for i in range(count)]
    return [Task(f"{file.stem}/{i}", prompt, target) for i, (prompt, target) in enumerate(found)]


def _unread(image: StoredImage) -> Any:
    """In place of a reader: the engine reads a task's pictures when it is the task's turn."""
    return image


def _pairs(where: str, line: str, folder: Path) -> list[StoredImage | Text]:
    """The pictures and then the captions in a line of a file. Raises UserError."""
    row = NEEDED.require(where, parse_json(where, line, one_line=True), ("captions", "images"))
    captions, images = row["captions"], row["images"]
    if not (isinstance(captions, list) and isinstance(images, list) and len(captions) == len(images) > 1):
        NEEDED.refuse(where, "has no lists of captions and images of one length, at least 2")
    try:
        return [
            *(picture(each, epath.Path(folder), generate=True) for each in images),
            *(Text(str(caption)) for caption in captions),
        ]
    except DocumentError as error:
        NEEDED.refuse(where, f"names a picture that cannot be used ({error})")


def _combinations(shown: Document, drawn: Document) -> list[Document]:
    """Each picture with noise given each caption, each caption given each picture, and each picture with noise
    alone.
    """
    captions = [part.text for part in shown if isinstance(part, Text)]
    seen, noised = ([part.pixels for part in each if isinstance(part, Image)] for each in (shown, drawn))
    return [
        *(illustrate(caption, each) for each in noised for caption in captions),
        *(describe(caption, each) for each in seen for caption in captions),
        *(illustrate("", each) for each in noised),
    ]


def _pairs_row(several: list[list[Score]]) -> Row:
    """log p of the documents of `_combinations`: of n pictures, n^2 + n^2 + n."""
    nats = np.array([math.fsum(part.nats for part in parts) for parts in several])
    n = math.isqrt(len(nats) // 2)
    given, told, alone = np.split(nats, [n**2, 2 * n**2])
    return {
        "image_given_caption": given.reshape(n, n).tolist(),
        "caption_given_image": told.reshape(n, n).tolist(),
        "image": alone.tolist(),
    }


def _document_row(parts: list[Score]) -> Row:
    images, texts = ([part for part in parts if bool(part.dims) == kind] for kind in (True, False))
    return {
        "image_nats": math.fsum(part.nats for part in images),
        "image_dims": sum(part.dims for part in images),
        "image_bits": math.fsum(part.bits_per_dim * part.dims for part in images),
        "text_nats": math.fsum(part.nats for part in texts),
        "text_tokens": sum(len(part.tokens) for part in texts),
    }
