"""`starflow2` train, init, eval and quickstart."""

import json
import os
import sys
import time
from pathlib import Path

from starflow2_jax.errors import UserError


def add(commands) -> None:
    for command in (_add_train, _add_init, _add_eval, _add_quickstart):
        command(commands)


def _add_train(commands) -> None:
    p = commands.add_parser("train", help="train an experiment, or resume it", allow_abbrev=False)
    p.add_argument(
        "--config",
        required=True,
        help="experiment: a file, or the name of one that ships, such as digits_quick; --config.KEY=VALUE sets a key",
    )
    p.add_argument("--out", default=None, help="checkpoint directory (default: runs/NAME of the experiment)")
    p.add_argument(
        "--runlocal",
        action="store_true",
        help="shrink the model and train a few steps, to try the experiment on this machine",
    )
    p.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=5,
        default=0,
        metavar="STEPS",
        help="trace a few steps (5 if no number is given) for xprof",
    )
    p.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs in DIR, so that a restart need not compile them again",
    )
    p.add_argument("--distributed", action="store_true", help="this is one of several processes that train together; JAX "
                   "finds the others through the cluster (TPU pod, Slurm), or the next three options name them")  # fmt: skip
    p.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 (default: $JAX_COORDINATOR_ADDRESS)"
    )
    p.add_argument("--processes", metavar="N", help="number of processes (default: $JAX_NUM_PROCESSES)")
    p.add_argument("--process", metavar="I", help="number of this process, counted from 0 (default: $JAX_PROCESS_ID)")
    p.set_defaults(run=_train, kept="the last checkpoint is kept, and the same command resumes from it")


def _train(args, overrides) -> None:
    from starflow2_jax.config import loading as configs

    config = configs.load(args.config, overrides, args.runlocal)
    out = args.out or f"runs/{Path(args.config).stem}"
    _devices(config.cpu_devices)
    if args.compilation_cache:
        _keep_compiled(args.compilation_cache)
    from starflow2_jax.parallel import processes

    processes.initialize(args)
    summary = _trained(config, out, args.profile)
    if processes.primary():
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in summary["share"].items())
        print(f"checkpoint: {out}\ntime: {shares} (more in {out}/metrics/summary.json)")


def _trained(config, out: str | Path, profile: int = 0) -> dict:
    """Train what is not done yet. Returns the summary; exits with RESTART after a SIGTERM."""
    from starflow2_jax.training.loop import Trainer
    from starflow2_jax.training.preemption import RESTART, Preempted

    try:
        return Trainer(config, out).run(profile=profile)
    except Preempted:
        print("starflow2: told to end (SIGTERM); all is saved, the same command goes on", file=sys.stderr)
        raise SystemExit(RESTART) from None


def _devices(cpu_devices: int) -> None:
    """Before JAX starts: that many CPU devices, where there is no accelerator."""
    import jax

    jax.config.update("jax_num_cpu_devices", cpu_devices)


def _keep_compiled(folder: str) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(folder).resolve()))


def _add_init(commands) -> None:
    p = commands.add_parser("init", help="start a run from a converted VLM, with untrained flows", allow_abbrev=False)
    p.add_argument("--vlm", required=True, help="checkpoint written by `starflow2 convert`")
    p.add_argument(
        "--config",
        required=True,
        help="experiment: a file, or the name of one that ships, such as digits_quick; --config.KEY=VALUE sets a key",
    )
    p.add_argument("--out", required=True, help="new checkpoint directory")
    p.set_defaults(run=_init)


def _init(args, overrides) -> None:
    from starflow2_jax.config import loading as configs

    config = configs.load(args.config, overrides)
    _devices(config.cpu_devices)
    from starflow2_jax.training.loop import Trainer

    Trainer.begin(config, args.out, args.vlm)
    print(f"ready: starflow2 train --config {args.config} --out {args.out}")


def _add_eval(commands) -> None:
    p = commands.add_parser("eval", help="evaluate a checkpoint on the digits", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, help="checkpoint directory")
    p.add_argument(
        "--limit",
        type=int,
        default=300,
        help="evaluate at most this many documents of each task (default: 300, at least 10)",
    )
    p.add_argument(
        "--out", help="folder for report.json, samples.png and index.html, the page that the quickstart also writes"
    )
    p.set_defaults(run=_eval)


def _eval(args, _) -> None:
    if args.limit < 10:
        raise UserError("--limit is at least 10: one digit of each kind")
    _report(args.checkpoint, args.limit, args.out)


def _report(checkpoint: str | Path, limit: int, out: str | Path | None, trained: float | None = None, **more) -> None:
    """Evaluate, print, and where `out` says so write the page. `trained`: seconds of the training."""
    from starflow2_jax.evaluation.digits import AIMS, evaluate
    from starflow2_jax.evaluation.report import write_report
    from starflow2_jax.sampling.engine import Sampler

    begin = time.time()
    numbers, samples = evaluate(Sampler.restore(checkpoint), limit)
    if trained is not None:
        numbers |= {"train_seconds": round(trained, 1), "total_seconds": round(trained + time.time() - begin, 1)}
    numbers |= more
    print(json.dumps(numbers, indent=1))
    if out:
        write_report(out, {**numbers, "aims": AIMS}, samples, Path(checkpoint) / "metrics" / "metrics.jsonl")
        print(f"open {Path(out) / 'index.html'}")


def _add_quickstart(commands) -> None:
    p = commands.add_parser(
        "quickstart",
        help="train a small model on handwritten digits, sample from it and evaluate it",
        allow_abbrev=False,
    )
    p.add_argument("--out", default="quickstart", help="folder for the checkpoint and the report (default: quickstart)")
    p.add_argument(
        "--smoke",
        action="store_true",
        help="train a few steps of each stage only, to try the installation; takes about a minute",
    )
    p.set_defaults(run=_quickstart, kept="the last checkpoint is kept, and the same command resumes from it")


def _quickstart(args, _) -> None:
    from starflow2_jax.config import loading as configs

    if args.smoke:  # most of it is compiling; read when JAX starts, which is below
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    experiment = Path(__file__).parents[1] / "experiments" / "digits_quick.py"
    config = configs.load(experiment, runlocal=args.smoke)
    _devices(config.cpu_devices)
    checkpoint = Path(args.out) / "checkpoint"
    spent = _trained(config, checkpoint)["seconds"]  # of all starts, where it was interrupted
    print("sampling and evaluating ...")
    _report(checkpoint, 10 if args.smoke else 300, args.out, spent["total"], smoke=args.smoke)
