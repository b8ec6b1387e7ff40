"""Runs any benchmark: answers its tasks into a folder that processes may share, then exports and scores the answers.

Beside the files of `sampling.batch_files`, the folder gets

manifest.jsonl   a line for each answer: {"key", "k", "seed", "files": of its images, "prompt": hash of what was asked}
scores.json      the benchmark's numbers by name, and
items.json       {name: {key: [value, weight]}} for those that are means of items: both for `starflow2 compare`
and the files that the benchmark's public scorer reads.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.checkpoints.atomic_folder import moved_folder, write_whole
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.data.documents import Document, Image, StoredImage, Text, counts
from starflow2_jax.data.images import ImageReader, opened, read_image
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.protocol import Answer, Benchmark, Page, Task, numbers, seed_of
from starflow2_jax.sampling import batch_files
from starflow2_jax.sampling.batch_files import Prompt, Share
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.fitting import fitted
from starflow2_jax.sampling.prompts import spoken


def evaluate(
    sampler: Sampler,
    benchmark: Benchmark,
    out: Path,
    run: dict[str, Any],
    seed: int = 0,
    batch: int = 64,
    share: Share = Share(),  # noqa: B008 - it is frozen
    options: Mapping[str, Any] | None = None,
    chat: bool = False,
    versions: Mapping[str, str] | None = None,
    progress: bool = True,
) -> tuple[dict[str, float | None], Page | None] | None:
    """The benchmark's numbers and the contents of its report; None if other processes still have answers to write.

    The answers are files in `out`; answers that are there already are not drawn again. `run`: the settings besides the
    tasks that decide the answers. `batch`: most prompts that run at once. `options`: fields of SampleOptions in place
    of the tasks' own. `chat`: put all prompts into the tokenizer's chat template, but for documents with parts that
    count, which are scored as they are. `versions`: of programs, for run.json. Raises UserError.
    """
    benchmark.begin(sampler)
    tokens = sampler.model.cfg.tokens
    tasks = [
        replace(task, options=replace(task.options, **(options or {})).sized(tokens), chat=task.chat or chat)
        for task in benchmark.tasks()
    ]
    if not tasks and share.processes > 1:
        raise UserError("this benchmark has no answers to share; run it in one process, with all devices")
    prompts = _prompts(sampler, tasks, benchmark.samples, seed)
    hashes = [digest(task) for task in tasks]
    about = {
        "tasks": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        "samples": benchmark.samples,
        "prompts": dict(benchmark.facts),
        "options": [asdict(each) for each in dict.fromkeys(task.options for task in tasks)],
    }
    batch_files.begin(out, run | about, versions)
    named = {task.key: task for task in tasks}

    def answer(several: list[Prompt], documents: list[Document], rows: int) -> list[Document]:
        together, seeds = [named[str(p.key)] for p in several], [seed for p in several for seed in p.seeds]
        return benchmark.answer(sampler, together, documents, together[0].options, seeds, rows)

    if not batch_files.write(sampler, prompts, out, batch, share=share, progress=progress, answer=answer):
        return None
    lines = batch_files.answered(out, prompts)
    answers, manifest = [], []
    for task, asked in zip(tasks, hashes, strict=True):
        for k, line in enumerate(lines[task.key]):
            pictures = tuple(out / part["image"] for part in line["parts"] if "image" in part)
            answers.append(Answer(task, k, partial(_document, line["parts"], out, sampler), pictures))
            files = [picture.name for picture in pictures]
            manifest.append({"key": task.key, "k": k, "seed": line["seed"], "files": files, "prompt": asked})
    with moved_folder(out) as folder:
        benchmark.export(answers, folder)
    write_whole(out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in manifest))
    scores = benchmark.score(answers, sampler)
    found, items = numbers(scores), {name: score for name, score in scores.items() if isinstance(score, dict)}
    write_whole(out / "scores.json", json.dumps(found, indent=1) + "\n")
    write_whole(out / "items.json", json.dumps(items) + "\n")
    return found, benchmark.page(answers)


def _prompts(sampler: Sampler, tasks: list[Task], samples: int, seed: int) -> list[Prompt]:
    """The prompt and the seeds of each task. Raises UserError if two tasks have the same key."""
    if len({task.key for task in tasks}) < len(tasks):
        raise UserError("two tasks of the benchmark have the same key; give each its own")
    return [
        Prompt(
            task.key,
            partial(_asked, sampler, task),
            task.options,
            tuple(seed_of(seed, task.key, k) for k in range(samples)),
            f"task {task.key}: ",
        )
        for task in tasks
    ]


def digest(task: Task) -> str:
    """Sixteen hexadecimal digits of a hash of a task: its key, options and prompt. Raises ImageError."""
    total = hashlib.sha256(repr((task.key, asdict(task.options), task.chat)).encode())
    for part in task.prompt:
        if isinstance(part, Text):
            total.update(part.text.encode())
        elif isinstance(part, Image):
            total.update(np.ascontiguousarray(part.pixels).tobytes())
        else:
            with opened(part) as file:
                total.update(part.via.encode() + file.read())
    return total.hexdigest()[:16]


def _asked(sampler: Sampler, task: Task) -> Document:
    """The task's prompt as the model reads it, as `Prompt.read` returns it. Raises DocumentError."""
    document = task.prompt
    if any(isinstance(part, StoredImage) for part in document):
        codec = sampler.codec
        read = ImageReader(codec.image_channels, codec.image_shape[:2], not codec.is_pixels)
        document = [read(part) if isinstance(part, StoredImage) else part for part in document]
    if task.chat and sampler.tokenizer.chat_template and not any(map(counts, document)):
        document = tokenizers.chat(sampler.tokenizer, [("user", spoken(sampler.tokenizer, document))])
    return fitted(sampler, document, task.options.max_tokens or 0)


def _document(parts: list[dict[str, str]], out: Path, sampler: Sampler) -> Document:
    """The document of an answer that was written to files; all its parts are marked as the model's predictions."""
    return [
        Image(read_image(out / part["image"], sampler.codec.image_channels), generate=True)
        if "image" in part
        else Text(part["text"], predict=True)
        for part in parts
    ]
