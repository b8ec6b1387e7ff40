"""A folder of answers to many prompts.

It is written batch by batch, can be resumed, and several processes may share it. Process i mod N answers batch i, and a
batch that was interrupted runs again with all of its prompts: so a prompt always runs beside the same others, and
neither the number of processes nor an interruption changes a bit of its answers.

run.json               the settings that decide the answers; a folder holds the answers of one run
samples.jsonl          a line for each answer: {"document": key, "seed": int, "parts": [{"text": str} | {"image":
name}]} samples.I-of-N.jsonl   the same from process I, if N processes share the batches
samples.json           the parts of all answers in the order of the prompts, written when all answers are there
NNN_K.png or .npy      image K of answer NNN; a prompt's answers have consecutive numbers
lock.json              while a process writes samples.jsonl: which one (checkpoints/lock.py); else lock.I-of-N.json
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.checkpoints.lock import Lock
from starflow2_jax.data.documents import Document, DocumentError, Image
from starflow2_jax.data.images import write_image
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.noise_space import denoise
from starflow2_jax.sampling.prompts import is_empty
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.text_files import read_text_file

Line = dict[str, Any]  # a line of samples.jsonl


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, and the seed of each of its answers. All prompts of a run have the same number of seeds."""

    key: int | str  # unique in the run
    read: Callable[[], Document]  # returns the prompt's document; called only when its batch begins
    options: SampleOptions
    seeds: tuple[int, ...]
    where: str = ""  # put in front of error messages about this prompt, such as "document 3: "


# (prompts that run together, their documents, rows of the largest batch) -> the answers, as many to each as it has
# seeds
Answering = Callable[[list[Prompt], list[Document], int], list[Document]]


@dataclass(frozen=True)
class Share:
    """The share of the batches that this process answers. Raises UserError for an index that is not below the count."""

    process: int = 0
    processes: int = 1

    def __post_init__(self):
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise UserError(
                f"--process={self.process} must be at least 0 and below --processes={self.processes}; change one of "
                f"them"
            )

    @property
    def file(self) -> str:
        """Name of the file that this process writes its answers to."""
        return f"samples.{self._part}jsonl"

    @property
    def lock(self) -> str:
        """Name of the file that keeps another process from the same share."""
        return f"lock.{self._part}json"

    @property
    def _part(self) -> str:
        return "" if self.processes == 1 else f"{self.process}-of-{self.processes}."


def about(sampler: Sampler, checkpoint: str | Path, dtype: str | None, seed: int) -> dict[str, Any]:
    """The settings that decide the answers of every kind of run; the caller adds those of its own kind."""
    solvers = [asdict(solver) for solver in (*(sampler.schedule or ()), sampler.deep)]
    checkpoint = str(Path(checkpoint).resolve())
    return {"checkpoint": checkpoint, "step": sampler.step, "dtype": dtype, "seed": seed, "solvers": solvers}


def begin(out: Path, run: dict[str, Any], versions: Mapping[str, str] | None = None) -> None:
    """Make the folder of a run, or resume the run in it.

    `versions`: of programs, which run.json records and which may change before a run is resumed. Raises UserError if
    the folder holds the answers of another run.
    """
    run, described = json.loads(json.dumps(run)), out / "run.json"
    if described.is_file():
        before = _object(read_text_file(described), str(described))
        if wrong := [name for name in run if run[name] != before.get(name)]:
            raise UserError(
                f"{out} holds samples of another run, whose {wrong[0]} was {before.get(wrong[0])!r} and not "
                f"{run[wrong[0]]!r}; name another --out, or remove the folder"
            )
    elif (out / "samples.jsonl").is_file():
        raise UserError(
            f"{out} holds samples of a single prompt, not of --documents; name another --out, or remove the folder"
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(described, json.dumps(run | ({"versions": dict(versions)} if versions else {}), indent=1))


def write(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    out: Path,
    batch: int,
    denoised: bool = False,
    share: Share = Share(),  # noqa: B008 - it is frozen
    progress: bool = True,
    answer: Answering | None = None,
) -> bool:
    """Answer the prompts of this process's share that have no answers yet.

    `answer`: what makes the answers; None: the sampler generates them. Returns whether all prompts are answered now.

    Consecutive prompts with equal options run together, at most `batch` at a time. With `denoised` the training noise
    is removed from the images. Raises DocumentError, which names the prompt, if a prompt does not fit the model, and
    LockedError if another process writes the same share.
    """
    with Lock(out, share.lock).held():
        return _write(sampler, prompts, out, batch, denoised, share, progress, answer or partial(_generated, sampler))


def _write(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    out: Path,
    batch: int,
    denoised: bool,
    share: Share,
    progress: bool,
    answer: Answering,
) -> bool:
    done = answered(out, prompts)
    mine = list(_batches(prompts, batch))[share.process :: share.processes]
    todo = [(several, rows) for several, rows in mine if any(prompts[i].key not in done for i in several)]
    count, left = (sum(len(several) for several, _ in batches) for batches in (mine, todo))
    _keep_complete(out / share.file, done)
    with tqdm(total=count, initial=count - left, unit="prompt", disable=not progress) as bar:
        for several, rows in todo:
            answers = _answers(sampler, [prompts[i] for i in several], denoised, rows, answer)
            with (out / share.file).open("a", encoding="utf-8") as file:
                for i, documents in zip(several, answers, strict=True):
                    if prompts[i].key not in done:
                        file.writelines(
                            json.dumps(line) + "\n" for line in _lines(sampler, prompts[i], i, documents, out)
                        )
            bar.update(len(several))
    done = answered(out, prompts)
    if complete := len(done) == len(prompts):
        listing = [line["parts"] for prompt in prompts for line in done[prompt.key]]
        write_whole(out / "samples.json", json.dumps(listing, indent=1))
    return complete


def write_anew(sampler: Sampler, prompt: Prompt, out: Path, denoised: bool = False) -> list[Line]:
    """Answer one prompt, replacing the answers to an earlier single prompt in `out`. Returns the lines of the answers.

    Raises DocumentError for a prompt that does not fit the model, UserError if `out` holds the answers to a file of
    prompts, and LockedError if another process writes there; all leave the folder's samples as they are.
    """
    if (out / "run.json").is_file():
        raise UserError(f"{out} holds samples of --documents; name another --out, or remove the folder")
    with Lock(out).held():
        [documents] = _answers(sampler, [prompt], denoised, 1, partial(_generated, sampler))
        lines = _lines(sampler, prompt, 0, documents, out)
        write_whole(out / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_whole(out / "samples.json", json.dumps([line["parts"] for line in lines], indent=1))
    return lines


def answered(out: Path, prompts: Sequence[Prompt]) -> dict[int | str, list[Line]]:
    """The lines of each completely answered prompt, by its key, whichever process wrote them. Raises UserError."""
    found: dict[int | str, dict[int, Line]] = {}
    for path in sorted(out.glob("samples*.jsonl")):
        for line in _whole_lines(path):
            found.setdefault(line["document"], {})[line["seed"]] = line
    return {
        prompt.key: [found[prompt.key][seed] for seed in prompt.seeds]
        for prompt in prompts
        if set(prompt.seeds) <= set(found.get(prompt.key, {}))
    }


def _batches(prompts: Sequence[Prompt], batch: int) -> Iterator[tuple[list[int], int]]:
    """Batches as (indices of prompts that run together, rows of the largest batch with the same options)."""
    for _, group in groupby(range(len(prompts)), lambda i: prompts[i].options):
        several = list(group)
        rows = min(batch, len(several))  # a shorter last batch is padded to it, so it needs no program of its own
        for start in range(0, len(several), batch):
            yield several[start : start + batch], rows


def _generated(sampler: Sampler, prompts: list[Prompt], documents: list[Document], rows: int) -> list[Document]:
    seeds = [seed for prompt in prompts for seed in prompt.seeds]
    return sampler.generate(documents, prompts[0].options, seeds, len(prompts[0].seeds), rows)


def _answers(
    sampler: Sampler, prompts: list[Prompt], denoised: bool, rows: int, answer: Answering
) -> list[list[Document]]:
    """The answers to each prompt, in a list for each. Raises DocumentError, which names the prompt."""
    num, asked = len(prompts[0].seeds), []
    for prompt in prompts:
        try:
            asked.append(prompt.read())
            if is_empty(asked[-1]) and not prompt.options.image_first:
                raise DocumentError("the prompt is empty; give some text or an image")
        except DocumentError as error:
            raise _named(error, prompt) from None
    try:
        answers = answer(prompts, asked, rows)
    except DocumentError as error:
        raise (error if error.index is None else _named(error, prompts[error.index])) from None
    if denoised:
        answers = denoise(sampler, [document for document in asked for _ in range(num)], answers, sampler.noise)
    return [answers[i : i + num] for i in range(0, len(answers), num)]


def _named(error: DocumentError, prompt: Prompt) -> DocumentError:
    """The error with the prompt's name in front, unless it is there already."""
    return error if str(error).startswith(prompt.where.removesuffix(": ")) else DocumentError(f"{prompt.where}{error}")


def _lines(sampler: Sampler, prompt: Prompt, index: int, documents: list[Document], out: Path) -> list[Line]:
    """Write the images of a prompt's answers into `out`, and return a line for each answer."""
    lines = []
    for k, (seed, document) in enumerate(zip(prompt.seeds, documents, strict=True)):
        name = f"{index * len(documents) + k:03d}"
        parts = [
            {"image": write_image(out / f"{name}_{p}", part.pixels, sampler.codec.makes_pixels).name}
            if isinstance(part, Image)
            else {"text": part.text}
            for p, part in enumerate(document)
        ]
        lines.append({"document": prompt.key, "seed": seed, "parts": parts})
    return lines


def _whole_lines(path: Path) -> Iterator[Line]:
    """All lines that end in a newline; a last line without one was cut off by a crash.

    Raises UserError for a bad line.
    """
    for number, line in enumerate(read_text_file(path).split("\n")[:-1], 1):
        if line:
            yield _object(line, f"{path}, line {number},", ("document", "seed", "parts"))


def _object(text: str, where: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object that this module wrote, with these keys. Raises UserError if it is damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise UserError(f"{where} is damaged (it is not what was written); remove the folder, or name another --out")
    return value


def _keep_complete(path: Path, done: dict[int | str, list[Line]]) -> None:
    """Drop from a file a line that was cut off, and the lines of prompts that are not completely answered."""
    if path.is_file():
        lines = [line for line in _whole_lines(path) if line in done.get(line["document"], ())]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
