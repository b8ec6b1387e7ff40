"""`starflow2 data`."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path

from starflow2_jax.commands.arguments import Commands, InputFolder, OutputFile, Whole, Words
from starflow2_jax.commands.experiment import add_config


def add(commands: Commands) -> None:
    """Add `starflow2 data` to the command line."""
    p = commands.add_parser("data", help="show what a stage will see of the training data")
    add_config(p)
    p.add_argument(
        "--stage", type=Words(), help="stage to show: a name, or 1, 2, 3 (default: the experiment's last stage)"
    )
    p.add_argument("--num", type=Whole(1), default=200, metavar="N", help="documents to read (default: 200)")
    p.add_argument(
        "--checkpoint",
        type=InputFolder(),
        metavar="DIR",
        help="a run's directory, whose tokenizer and codec are used (default: ones fitted to the data, as for a new "
        "run)",
    )
    p.add_argument("--out", type=OutputFile(), metavar="FILE", help="write a page of the documents to this HTML file")
    p.add_argument("--json", type=OutputFile(), metavar="FILE", help="also write the numbers to this file")
    p.add_argument("--runlocal", action="store_true", help="shrink the model")
    p.set_defaults(run=_data)


def _data(args: Namespace, overrides: list[str]) -> None:
    from starflow2_jax.checkpoints.directory import CheckpointDirectory
    from starflow2_jax.commands.training import start_devices
    from starflow2_jax.config import loading as configs
    from starflow2_jax.evaluation import data_report
    from starflow2_jax.training.loop import Trainer
    from starflow2_jax.training.program import find_stage

    config = configs.load(args.config, overrides, args.runlocal, args.chip)
    stage = find_stage(config, args.stage)
    if args.checkpoint:
        CheckpointDirectory(args.checkpoint).config()  # refuses a folder of another kind
    start_devices(config.cpu_devices)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, args.checkpoint or Path(scratch) / "run")
    task = trainer.task(stage.name)
    streams = task.streams()
    encode = task.row_encoder(streams)
    found = data_report.look(streams, encode, args.num)
    numbers = data_report.summary(streams, found, encode)
    print(data_report.as_text(numbers))
    if args.json:
        _write(args.json, json.dumps(numbers, indent=1))
    if args.out:
        _write(args.out, data_report.page(stage, numbers, found, trainer.tokenizer, trainer.codec))
        print(f"page: {args.out}")


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
