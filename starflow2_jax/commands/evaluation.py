"""eval."""

import json
import tempfile
import time
from pathlib import Path

from starflow2_jax.commands.model import add_model, restore
from starflow2_jax.errors import UserError


def add(commands) -> None:
    p = commands.add_parser("eval", help="a benchmark's numbers of a checkpoint, and a page", allow_abbrev=False)
    add_model(p)
    p.add_argument("--benchmark", required=True, help="its name, such as digits")
    p.add_argument("--data", help="file or folder that the benchmark reads its tasks from, where it does")
    p.add_argument("--limit", type=int, help="tasks of each kind at most (default: the benchmark's own)")
    p.add_argument("--batch", type=int, default=64, help="tasks answered at a time")
    p.add_argument("--seed", type=int, default=0, help="with a task's key it decides the draws of the task's answers")
    p.add_argument("--process", type=int, default=0, metavar="I", help="which of --processes this is, from 0")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="how many share the tasks, through --out")
    p.add_argument(
        "--out", help="folder for report.json, index.html and the answers; what is answered there is not done again"
    )
    p.set_defaults(run=_eval, kept="the answers that are finished stand in --out")


def _eval(args, _) -> None:
    if args.batch < 1:
        raise UserError(f"--batch is at least 1, not {args.batch}")
    if args.out is None and args.processes > 1:
        raise UserError("several processes share the tasks through a folder; name it with --out")
    report(args)


def report(args, trained: float | None = None, **more) -> None:
    """Evaluate, print the numbers and `more`, and where `args.out` says so write the page.

    `args`: what the command takes; `trained`: seconds of the training, if they are among the numbers.
    """
    from starflow2_jax.evaluation import engine
    from starflow2_jax.evaluation.report import write_report
    from starflow2_jax.evaluation.table import open_benchmark
    from starflow2_jax.sampling import batch_files

    begin, share = time.time(), batch_files.Share(args.process, args.processes)
    benchmark = open_benchmark(args.benchmark, args.data, args.limit)
    sampler = restore(args)
    run = {"benchmark": args.benchmark} | batch_files.about(sampler, args.checkpoint, args.dtype, args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(args.out or scratch) / "answers"
        found = engine.evaluate(sampler, benchmark, answers, run, args.seed, args.batch, share)
    if found is None:
        print(f"this process's tasks are answered in {answers}; the last process to finish writes the report")
        return
    numbers, page = found
    if trained is not None:
        numbers |= {"train_seconds": round(trained, 1), "total_seconds": round(trained + time.time() - begin, 1)}
    numbers |= more
    print(json.dumps(numbers, indent=1))
    if args.out:
        metrics = Path(args.checkpoint) / "metrics" / "metrics.jsonl"
        write_report(args.out, {**numbers, "aims": benchmark.aims}, page, metrics)
        print(f"open {Path(args.out) / 'index.html'}")
