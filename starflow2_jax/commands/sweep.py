"""`starflow2 sweep`."""

from argparse import Namespace
from functools import partial
from pathlib import Path

from starflow2_jax.commands.arguments import Commands, OutputFolder, Shipped, Words
from starflow2_jax.commands.experiment import add_chip
from starflow2_jax.errors import UserError


def add(commands: Commands) -> None:
    """Add `starflow2 sweep` to the command line."""
    p = commands.add_parser("sweep", help="train one experiment with many settings")
    p.add_argument(
        "--sweep",
        type=Shipped(),
        required=True,
        metavar="FILE",
        help="sweep file, or the name of one that ships, such as digits_lr",
    )
    p.add_argument(
        "--out", type=OutputFolder(), required=True, metavar="DIR", help="folder for the runs, the table and the plot"
    )
    p.add_argument(
        "--launcher",
        type=Words(),
        metavar="COMMAND",
        help='submit each point with this command instead of training it here, for example "env CONFIG={config} '
        'OUT={out} launch/slurm.sh submit {overrides}"; {name} stands for a job name. Run the same sweep again later '
        "to collect results",
    )
    p.add_argument(
        "--again",
        nargs="?",
        const="ended",
        choices=("ended", "all"),
        help="submit points again whose jobs failed. A job counts as failed when its exit code is in the file $ENDED, "
        "which "
        'launch/slurm.sh writes. "--again all" also submits points whose jobs left no exit code, because they were '
        "killed "
        "or cancelled. Use it only after checking that no job is still running: two jobs in one folder destroy the run",
    )
    p.add_argument("--runlocal", action="store_true", help="shrink each model and train it a few steps")
    add_chip(p)
    p.set_defaults(run=_sweep, kept="finished points are kept, and the same command trains the rest")


def _sweep(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.checkpoints.lock import Lock
    from starflow2_jax.sweeps import points, report

    if args.launcher and args.runlocal:
        raise UserError(
            "--runlocal shrinks points that are trained here; with --launcher, put it into the launcher's command"
        )
    if args.again and not args.launcher:
        raise UserError("--again submits points to a launcher again; name the launcher with --launcher")
    sweep = points.load(args.sweep, args.out, args.runlocal, args.chip)
    with Lock(Path(args.out)).held():
        try:
            if args.launcher:
                points.submit(sweep, args.launcher, args.again)
            else:
                points.run(sweep, partial(points.train_command, sweep, runlocal=args.runlocal))
        finally:
            rows = report.write(sweep, args.out)
    print(report.markdown(rows), end="")
    if failed := sum(point.state == points.FAILED for point in sweep.points):
        again = " with --again" if args.launcher else " again"
        raise UserError(
            f"{failed} of {len(sweep.points)} points failed; the table says why; correct this and run the same "
            f"command{again}"
        )
