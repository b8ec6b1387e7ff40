"""`starflow2`: plumbing from the command line to the library."""

import argparse
import os
import sys

from starflow2_jax.commands import bench, chat, config, evaluation, plan, sampling, serve, sweep, training, weights
from starflow2_jax.errors import UserError
from starflow2_jax.extensions import import_file


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it need not tell that there is no PyTorch
    parser = argparse.ArgumentParser(prog="starflow2", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (training, evaluation, config, sweep, plan, bench, sampling, chat, serve, weights):
        module.add(commands)
    for command in set(commands.choices.values()):
        command.add_argument("--import", dest="imports", metavar="FILE", action="append", default=[], help=(
            "Python file to run first, which adds codecs, sources, stages or benchmarks of your own; may be given several times"
        ))  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    overridden = [r for r in rest if r.startswith("--config.")]
    overrides = [r.removeprefix("--config.") for r in overridden]
    if unknown := [r for r in rest if r not in overridden or not hasattr(args, "config")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    try:
        for file in args.imports:
            import_file(file)
        args.run(args, overrides)
    except UserError as error:
        print(f"starflow2: {error}", file=sys.stderr)
        return 2
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"starflow2: {reason}; name another path or make way there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"starflow2: interrupted; {getattr(args, 'kept', 'nothing was written')}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
