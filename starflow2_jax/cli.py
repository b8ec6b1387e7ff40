"""`starflow2`: the command line. It parses arguments and calls the library."""

import argparse
import os
import sys

from starflow2_jax import __version__
from starflow2_jax.commands import bench, chat, config, evaluation, plan, sampling, serve, sweep, training, weights
from starflow2_jax.errors import UserError, storage_errors
from starflow2_jax.extensions import import_file

ABOUT = (
    "STARFlow2: one causal model that reads and writes text and images. `starflow2 COMMAND --help` explains a command."
)
EXIT_CODES = """exit codes:
  0    done
  1    an error in the program or a failure of the machine; the traceback or the last line says what
  2    wrong input: a sentence on stderr says what is wrong and what to do
  74   a file could not be written: the disk is full or read-only, or a quota is used up; the last checkpoint stays
  75   try again: training was told to end (SIGTERM) and saved its state, or another run may still write there
  130  interrupted (Ctrl-C)"""


def main(argv: list[str] | None = None) -> int:
    if argv is None and not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        _restart_in_utf8_mode()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that PyTorch is missing
    parser = argparse.ArgumentParser(
        prog="starflow2",
        description=ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"starflow2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
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
        with storage_errors(getattr(args, "out", None) or "the output"):
            args.run(args, overrides)
    except UserError as error:
        print(f"starflow2: {error}", file=sys.stderr)
        return error.exit_code
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"starflow2: {reason}; name another path or make way there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"starflow2: interrupted; {getattr(args, 'kept', 'nothing was written')}", file=sys.stderr)
        return 130
    return 0


def _restart_in_utf8_mode() -> None:
    """Start this process again with UTF-8 instead of the locale's encoding for arguments, file names and the terminal."""
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
