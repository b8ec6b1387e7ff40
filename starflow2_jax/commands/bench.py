"""`starflow2 bench`."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path

from starflow2_jax.commands.arguments import Commands, OutputFile, OutputFolder, Whole, Words
from starflow2_jax.commands.experiment import add_config

STEPS = {"train": 20, "data": 50, "checkpoint": 3}


def add(commands: Commands) -> None:
    """Add `starflow2 bench` to the command line."""
    p = commands.add_parser("bench", help="measure the speed of training, data or checkpoints on this machine")
    p.add_argument("what", choices=STEPS, help="what to measure")
    add_config(p)
    p.add_argument(
        "--stage", type=Words(), help="stage to measure: a name, or 1, 2, 3 (default: the experiment's last stage)"
    )
    p.add_argument(
        "--steps",
        type=Whole(1),
        metavar="N",
        help="number of steps, batches or saves to time (default: 20 steps, 50 batches or 3 saves)",
    )
    p.add_argument("--synthetic", action="store_true", help="use generated documents instead of data.source")
    p.add_argument(
        "--folder",
        type=OutputFolder(),
        metavar="DIR",
        help="with `checkpoint`: write below this folder, to measure its file system (default: the temporary folder)",
    )
    p.add_argument(
        "--profile",
        type=OutputFolder(),
        metavar="DIR",
        help="with `train`: write a trace into this folder, and report the ten operations that take longest",
    )
    p.add_argument("--json", type=OutputFile(), metavar="FILE", help="also write the numbers to this file")
    p.add_argument("--runlocal", action="store_true", help="shrink the model")
    p.set_defaults(run=_bench)


def _bench(args: Namespace, overrides: list[str]) -> None:
    from starflow2_jax.commands.training import start_devices
    from starflow2_jax.config import loading as configs
    from starflow2_jax.training.program import find_stage

    config = configs.load(args.config, overrides, args.runlocal, args.chip)
    stage = find_stage(config, args.stage)
    start_devices(config.cpu_devices)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        found = _measure(args, config, stage, Path(scratch))
    found = {"bench": args.what, "config": Path(args.config).name, "overrides": overrides, **found}
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


def _measure(args, config, stage, folder: Path) -> dict:
    from starflow2_jax.benchmarks import checkpoint, data, synthetic, train

    steps = args.steps or STEPS[args.what]
    if args.synthetic:
        synthetic.use(config, stage, folder)
    if args.what == "train":
        trace = Path(args.profile) if args.profile else None
        return train.measure(config, stage.name, steps, folder / "trainer", trace)
    return (data if args.what == "data" else checkpoint).measure(config, stage.name, steps, folder)
