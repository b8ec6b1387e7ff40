"""`starflow2 train`, `init` and `quickstart`."""

import os
import shlex
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from starflow2_jax.commands import evaluation
from starflow2_jax.commands.arguments import Commands, InputFolder, OutputFolder, Whole, Words
from starflow2_jax.commands.experiment import add_config
from starflow2_jax.errors import Terminated

KEPT = "the last checkpoint is kept, and the same command resumes from it"


class Demo(NamedTuple):
    """What the quickstart trains and evaluates."""

    experiment: str
    benchmark: str
    few: int  # tasks of each kind in a mere trial
    codec: str = ""  # the experiment that trains the codec; "": it needs no training


DEMOS = {
    "digits": Demo("digits_quick", "digits", 10),
    "scenes": Demo("scenes_fae", "scenes_quick", 1, codec="fae_scenes"),
}


def add(commands: Commands) -> None:
    """Add `starflow2 train`, `init` and `quickstart` to the command line."""
    for command in (_add_train, _add_init, _add_quickstart):
        command(commands)


def _add_train(commands: Commands) -> None:
    p = commands.add_parser("train", help="train an experiment, or resume it")
    add_config(p)
    p.add_argument(
        "--out", type=OutputFolder(), metavar="DIR", help="checkpoint directory (default: runs/NAME of the experiment)"
    )
    p.add_argument(
        "--runlocal",
        action="store_true",
        help="shrink the model and train a few steps, to try the experiment on this machine",
    )
    p.add_argument(
        "--profile",
        nargs="?",
        type=Whole(1),
        const=5,
        default=0,
        metavar="STEPS",
        help="trace a few steps (5 if no number is given) for xprof",
    )
    p.add_argument(
        "--compilation-cache",
        type=OutputFolder(),
        metavar="DIR",
        help="keep compiled programs in DIR, so that a restart need not compile them again",
    )
    p.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that train together; JAX finds the others through the cluster (TPU pod, "
        "Slurm), or the next three options name them",
    )
    p.add_argument(
        "--coordinator",
        type=Words(),
        metavar="HOST:PORT",
        help="address of process 0 (default: $JAX_COORDINATOR_ADDRESS)",
    )
    p.add_argument("--processes", type=Whole(1), metavar="N", help="number of processes (default: $JAX_NUM_PROCESSES)")
    p.add_argument(
        "--process",
        type=Whole(0),
        metavar="I",
        help="number of this process, counted from 0 (default: $JAX_PROCESS_ID)",
    )
    p.set_defaults(run=_train, kept=KEPT)


def _train(args: Namespace, overrides: list[str]) -> None:
    from starflow2_jax.config import loading as configs
    from starflow2_jax.parallel import processes
    from starflow2_jax.weights.vlm import load_config

    out = args.out or f"runs/{Path(args.config).stem}"
    begun_on = Path(out) / "vlm.json"  # `starflow2 init` copies it; its sizes need not be given again
    vlm = load_config(begun_on) if begun_on.exists() else None
    config = configs.load(args.config, overrides, args.runlocal, args.chip, tuple(configs.PAGES), vlm)
    if args.compilation_cache:
        _keep_compiled(args.compilation_cache)
    start_devices(config.cpu_devices, partial(processes.initialize, args))
    summary = _trained(config, out, args.profile)
    if processes.primary():
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in summary["share"].items())
        print(f"checkpoint: {out}\ntime: {shares} (more in {out}/metrics/summary.json)")


def _trained(config, out: str | Path, profile: int = 0) -> dict:
    """Train the rest of the run. Returns the summary of its time; raises Terminated when all is saved after a
    SIGTERM.
    """
    from starflow2_jax.config.loading import CODEC
    from starflow2_jax.training.codec.trainer import CodecTrainer
    from starflow2_jax.training.loop import Trainer
    from starflow2_jax.training.preemption import Preempted

    trainer = CodecTrainer if config.kind == CODEC else Trainer
    try:
        return trainer(config, out).run(profile=profile)
    except Preempted:
        raise Terminated("all is saved, and the same command goes on") from None


def start_devices(cpu_devices: int, join: Callable[[], None] = lambda: None) -> None:
    """Start JAX, with `cpu_devices` CPU devices where there is no accelerator. `join` joins the other processes of the
    run, which must happen before JAX starts its devices. Raises UserError."""
    import jax

    from starflow2_jax.parallel import devices

    jax.config.update("jax_num_cpu_devices", cpu_devices)
    join()
    devices.start()


def _keep_compiled(folder: str) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(folder).resolve()))


def _add_init(commands: Commands) -> None:
    p = commands.add_parser("init", help="start a run from a converted VLM, with untrained flows")
    p.add_argument(
        "--vlm", type=InputFolder(), required=True, metavar="DIR", help="checkpoint written by `starflow2 convert`"
    )
    add_config(p)
    p.add_argument(
        "--codec",
        type=InputFolder("folder of a codec"),
        metavar="DIR",
        help="folder of the codec, which the run's directory gets a copy of; short for --config.codec.path",
    )
    p.add_argument("--out", type=OutputFolder(), required=True, metavar="DIR", help="new checkpoint directory")
    p.add_argument("--runlocal", action="store_true", help="shrink the flows as `starflow2 train --runlocal` does")
    p.add_argument(
        "--force", action="store_true", help="begin even if the flows do not fit into the memory that is free"
    )
    p.set_defaults(run=_init)


def _init(args: Namespace, overrides: list[str]) -> None:
    from starflow2_jax.config import loading as configs
    from starflow2_jax.training.loop import Trainer
    from starflow2_jax.weights.vlm import load_config

    vlm = load_config(Path(args.vlm) / "vlm.json")
    if args.codec:
        overrides = [*overrides, f"codec.path={Path(args.codec).resolve()}"]
    config = configs.load(args.config, overrides, args.runlocal, args.chip, vlm=vlm)
    start_devices(config.cpu_devices)
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {line}", flush=True)

    Trainer.begin(config, args.out, args.vlm, load_config, say, args.force)
    chip = [*(["--chip", args.chip] if args.chip else []), *(["--runlocal"] if args.runlocal else [])]
    given = [f"--config.{override}" for override in overrides]
    train = ["starflow2", "train", "--config", args.config, *chip, *given, "--out", args.out]
    print(f"ready: {shlex.join(map(str, train))}")


def _add_quickstart(commands: Commands) -> None:
    p = commands.add_parser(
        "quickstart",
        help="train a small model on handwritten digits or emoji scenes, sample from it and evaluate it",
    )
    p.add_argument(
        "--demo",
        choices=DEMOS,
        default="digits",
        help="digits, ten minutes on two CPU cores, or scenes, an hour (default: digits)",
    )
    p.add_argument(
        "--out",
        type=OutputFolder(),
        default="quickstart",
        metavar="DIR",
        help="folder for the checkpoint and the report (default: quickstart)",
    )
    p.add_argument(
        "--smoke",
        action="store_true",
        help="train a few steps of each stage only, to try the installation; takes about a minute",
    )
    p.set_defaults(run=_quickstart, kept=KEPT)
    p.set_defaults(data=None, part=None, batch=300, seed=0, process=0, processes=1, dtype=None, fsdp=1, tensor=1)


def _quickstart(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.config import loading as configs

    if args.smoke:  # it mostly compiles; XLA reads this variable when JAX starts, which is below
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    demo, args.checkpoint, codec = DEMOS[args.demo], Path(args.out) / "checkpoint", Path(args.out) / "codec"
    args.benchmark, args.limit = demo.benchmark, demo.few if args.smoke else None
    runs, overrides = [], []
    if demo.codec:
        runs.append((codec, configs.load(demo.codec, runlocal=args.smoke, kinds=[configs.CODEC])))
        overrides.append(f"codec.path={codec}")
    runs.append((args.checkpoint, configs.load(demo.experiment, overrides, args.smoke)))
    start_devices(runs[0][1].cpu_devices)
    spent = sum(_trained(config, folder)["seconds"]["total"] for folder, config in runs)  # over all starts
    print("sampling and evaluating ...")
    evaluation.report(args, spent, smoke=args.smoke)
