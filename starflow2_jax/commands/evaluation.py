"""`starflow2 eval`."""

import json
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow2_jax import __version__
from starflow2_jax.commands.arguments import Commands, InputPath, OutputFolder, Whole, Words, add_share
from starflow2_jax.commands.model import SEED, add_model, restore
from starflow2_jax.commands.sampling_options import add_overrides
from starflow2_jax.errors import UserError

if TYPE_CHECKING:
    from starflow2_jax.sampling.engine import Sampler

OVERRIDES = {  # fields of SampleOptions that the command line may set for all tasks
    "guidance": "--guidance",
    "image_guidance": "--image-guidance",
    "image_temperature": "--temperature",
    "temperature": "--text-temperature",
    "top_p": "--top-p",
    "max_tokens": "--max-tokens",
}


def add(commands: Commands) -> None:
    """Add `starflow2 eval` to the command line."""
    p = commands.add_parser("eval", help="run a benchmark on a checkpoint: numbers, and a page that shows the answers")
    add_model(p)
    p.add_argument(
        "--benchmark",
        type=Words(),
        required=True,
        metavar="NAME",
        help="benchmark to run, such as digits or geneval; docs/evaluation.md lists them",
    )
    p.add_argument(
        "--data",
        "--prompts",
        type=InputPath(),
        metavar="PATH",
        help="file or folder with the benchmark's tasks; leave it out for a benchmark that brings its own",
    )
    p.add_argument(
        "--limit",
        type=Whole(1),
        metavar="N",
        help="largest number of tasks of each kind (default: the benchmark's own)",
    )
    p.add_argument(
        "--part",
        type=Words(),
        metavar="NAME",
        help="part of the benchmark's data, such as validation to choose options by (default: the benchmark's own, "
        "test)",
    )
    add_overrides(p, OVERRIDES)
    p.add_argument(
        "--chat",
        action="store_true",
        help="put all prompts into the tokenizer's chat template, as a user's messages, and not those of questions "
        "alone",
    )
    p.add_argument("--batch", type=Whole(1), default=64, metavar="N", help="tasks to answer at a time (default: 64)")
    p.add_argument(
        "--seed",
        type=SEED,
        default=0,
        metavar="N",
        help="random seed; a task's draws depend on it and on the task (default: 0)",
    )
    add_share(p, "batches through --out")
    p.add_argument(
        "--out",
        type=OutputFolder(),
        metavar="DIR",
        help="folder for report.json, index.html and the answers; the same command again answers only the remaining "
        "tasks",
    )
    p.set_defaults(run=_eval, kept="finished answers are kept in --out")


def _eval(args: Namespace, _: list[str]) -> None:
    if args.out is None and args.processes > 1:
        raise UserError("--processes needs --out: several processes share the tasks through that folder")
    report(args)


def report(args: Namespace, trained: float | None = None, **more: object) -> None:
    """Run a benchmark and print its numbers. If `args.out` is set, write them and the page into that folder.

    `args`: the command's options. `trained`: seconds of the training, which then are among the numbers. `more`: further
    entries to print and write beside the numbers. Raises UserError.
    """
    from starflow2_jax.evaluation import engine
    from starflow2_jax.evaluation.report import write_report
    from starflow2_jax.evaluation.table import open_benchmark
    from starflow2_jax.sampling import batch_files

    begin, share = time.time(), batch_files.Share(args.process, args.processes)
    benchmark = open_benchmark(args.benchmark, args.data, args.limit, args.part)
    if benchmark.draws:
        _require_pictures(args)
        if args.out is None:
            raise UserError(
                f"the benchmark {args.benchmark} needs --out, the folder for the pictures that its scorer reads"
            )
    sampler = restore(args)
    run = {"benchmark": args.benchmark, "batch": args.batch} | batch_files.about(
        sampler, args.checkpoint, args.dtype, args.seed
    )
    chosen = {field: value for field in OVERRIDES if (value := getattr(args, field, None)) is not None}
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(args.out or scratch) / "answers"
        found = engine.evaluate(
            sampler,
            benchmark,
            answers,
            run | _model(sampler),
            args.seed,
            args.batch,
            share,
            chosen,
            getattr(args, "chat", False),
            _versions(),
        )
    if found is None:
        print(f"the answers of this process are in {answers}; the last process to finish writes the report")
        return
    numbers, page = found
    if trained is not None:
        numbers |= {"train_seconds": round(trained, 1), "total_seconds": round(trained + time.time() - begin, 1)}
    numbers |= more
    print(json.dumps(numbers, indent=1))
    if args.out:
        print(f"the answers, and the files for the benchmark's own scorer, are in {answers}")
        metrics = Path(args.checkpoint) / "metrics" / "metrics.jsonl"
        write_report(args.out, {**numbers, "aims": benchmark.aims}, page, metrics)
        print(f"open {Path(args.out) / 'index.html'}")


def _require_pictures(args: Namespace) -> None:
    """Raises UserError if the checkpoint's images are latents. It reads no weights of the model."""
    from starflow2_jax.checkpoints.directory import CheckpointDirectory

    checkpoint = CheckpointDirectory(args.checkpoint)
    checkpoint.config()
    if not checkpoint.codec().makes_pixels:
        raise UserError(
            f"the benchmark {args.benchmark} needs pictures, and {args.checkpoint} has no decoder: its images are "
            f"latents; use a checkpoint whose codec decodes pictures"
        )


def _model(sampler: "Sampler") -> dict[str, Any]:
    """What answers: a hash of all weights in the types that they have here, whether they are the moving average, the
    codec's hash, and the shape of the images that it takes.
    """
    from starflow2_jax.codecs.fingerprint import fingerprint
    from starflow2_jax.parallel.content_hash import content_hash

    average = sampler.step is not None  # at the end of a stage it became the parameters, until then it is read
    codec = {"codec": fingerprint(sampler.codec)[:16], "image": list(sampler.codec.image_shape)}
    return {"weights": content_hash(sampler.params)[:16], "average": average, **codec}


def _versions() -> dict[str, str]:
    import jax

    others = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "pillow")}
    return {"starflow2_jax": __version__, **others, "device": jax.devices()[0].device_kind}
