"""sweep."""

import signal
from functools import partial
from pathlib import Path

from starflow2_jax.commands.experiment import add_chip


def add(commands) -> None:
    p = commands.add_parser("sweep", help="one experiment at many points of its config", allow_abbrev=False)
    p.add_argument(
        "--sweep",
        required=True,
        metavar="FILE",
        help="sweep file, or the name of one of this package, such as digits_lr",
    )
    p.add_argument("--out", required=True, help="folder of the runs, the table and the plot")
    p.add_argument(
        "--launcher",
        help='hand each point to this command, such as "env CONFIG={config} OUT={out} launch/slurm.sh submit {overrides}", '
        "instead of training it here; the same call later collects what is done. {name} is a name for the point's job",
    )
    p.add_argument(
        "--again",
        nargs="?",
        const="ended",
        choices=("ended", "all"),
        help="hand points on once more whose jobs are known to have ended without being done: those of launch/slurm.sh say "
        "so, and any job that writes its exit code into the file $ENDED of its launcher. A job that was killed, or "
        'cancelled in the queue, says nothing; "all" hands on whatever is not done: see first that no job is left, two in '
        "one folder spoil it",
    )
    p.add_argument("--runlocal", action="store_true", help="shrink each run to a few steps")
    add_chip(p)
    p.set_defaults(run=_sweep, kept="points that are done stand; the same command goes on with the rest")


def _sweep(args, _) -> None:
    from starflow2_jax.errors import UserError
    from starflow2_jax.sweeps import points, report

    if args.launcher and args.runlocal:
        raise UserError("--runlocal is for runs here; put it into the launcher's command")
    if args.again and not args.launcher:
        raise UserError("--again is for points that a --launcher was given")
    sweep = points.load(args.sweep, args.out, args.runlocal, args.chip)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped is interrupted: the running point saves
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
        raise UserError(f"{failed} of {len(sweep.points)} points failed; mend them and run the same command{again}")
