"""`starflow2` train, init and quickstart."""

import os
import sys
from pathlib import Path

from starflow2_jax.commands import evaluation
from starflow2_jax.commands.experiment import add_config


def add(commands) -> None:
    for command in (_add_train, _add_init, _add_quickstart):
        command(commands)


def _add_train(commands) -> None:
    p = commands.add_parser("train", help="train an experiment, or resume it", allow_abbrev=False)
    add_config(p)
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

    config = configs.load(args.config, overrides, args.runlocal, args.chip)
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
    add_config(p)
    p.add_argument("--out", required=True, help="new checkpoint directory")
    p.set_defaults(run=_init)


def _init(args, overrides) -> None:
    from starflow2_jax.config import loading as configs

    config = configs.load(args.config, overrides, chip=args.chip)
    _devices(config.cpu_devices)
    from starflow2_jax.training.loop import Trainer
    from starflow2_jax.weights.vlm import load_config

    Trainer.begin(config, args.out, args.vlm, load_config)
    chip = f" --chip {args.chip}" if args.chip else ""
    print(f"ready: starflow2 train --config {args.config}{chip} --out {args.out}")


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
    p.set_defaults(
        benchmark="digits", data=None, batch=300, seed=0, process=0, processes=1, dtype=None, fsdp=1, tensor=1
    )


def _quickstart(args, _) -> None:
    from starflow2_jax.config import loading as configs

    if args.smoke:  # most of it is compiling; read when JAX starts, which is below
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    config = configs.load("digits_quick", runlocal=args.smoke)
    _devices(config.cpu_devices)
    args.checkpoint = Path(args.out) / "checkpoint"
    args.limit = 10 if args.smoke else None
    spent = _trained(config, args.checkpoint)["seconds"]["total"]  # of all starts, where it was interrupted
    print("sampling and evaluating ...")
    evaluation.report(args, spent, smoke=args.smoke)
