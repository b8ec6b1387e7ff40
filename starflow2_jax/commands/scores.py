"""`starflow2 fid` and `compare`."""

import json
import os
from argparse import Namespace
from pathlib import Path

from starflow2_jax.commands.arguments import (
    Commands,
    InputFile,
    InputFolder,
    InputPath,
    OutputFile,
    OutputFolder,
    Whole,
)


def add(commands: Commands) -> None:
    """Add `starflow2 fid` and `compare` to the command line."""
    _add_fid(commands)
    _add_compare(commands)


def _add_fid(commands: Commands) -> None:
    p = commands.add_parser("fid", help="compute the Fréchet distance of two folders of pictures")
    p.add_argument("--images", type=InputFolder(), required=True, metavar="DIR", help="folder of generated pictures")
    p.add_argument(
        "--reference",
        type=InputPath(),
        required=True,
        metavar="PATH",
        help="folder of real pictures, or an .npz file of their statistics (mu, sigma)",
    )
    p.add_argument(
        "--features",
        type=InputFile(),
        required=True,
        metavar="FILE",
        help="network of the features: a TorchScript file, or the weights of torch-fidelity's Inception",
    )
    p.add_argument("--batch", type=Whole(1), default=64, metavar="N", help="pictures to run at a time (default: 64)")
    p.add_argument(
        "--cache",
        type=OutputFolder(),
        metavar="DIR",
        help="folder that keeps the statistics of folders (default: ~/.cache/starflow2/statistics)",
    )
    p.add_argument("--out", type=OutputFile(), metavar="FILE", help="write the result to this JSON file, too")
    p.set_defaults(run=_fid, kept="finished statistics are kept in --cache")


def _fid(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.evaluation.frechet import distance

    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(args.cache) if args.cache else caches / "starflow2" / "statistics"
    found = distance(Path(args.images), Path(args.reference), Path(args.features), cache, args.batch)
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")


def _add_compare(commands: Commands) -> None:
    p = commands.add_parser("compare", help="show the scores of several evaluations side by side")
    p.add_argument(
        "runs",
        type=InputFolder(),
        nargs="+",
        metavar="DIR",
        help="folders that `starflow2 eval` has written (--out), or with a scores.json of your own",
    )
    p.set_defaults(run=_compare)


def _compare(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.evaluation.compare import column_names, compared, read_run, table

    folders = [Path(run) for run in args.runs]
    print(table(column_names(folders), compared([read_run(folder) for folder in folders])))
