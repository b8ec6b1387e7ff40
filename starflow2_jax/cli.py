"""`starflow2`: the command line. It parses arguments, calls the library, and turns what goes wrong into one line."""

import argparse
import atexit
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from types import FrameType

from starflow2_jax.errors import OUT_OF_ROOM, StorageError, Terminated, UserError, refused_write
from starflow2_jax.text_files import shorten

ABOUT = (
    "STARFlow2: one causal model that reads and writes text and images. `starflow2 COMMAND --help` explains a command."
)
EXIT_CODES = """exit codes:
  0    done
  1    an error in the program or a failure of the machine; the traceback or the last line says what
  2    wrong input, or a path that cannot be used; a sentence on stderr says what is wrong and what to do
  74   a file could not be written, because the disk or a quota is full or the disk is read-only
  75   try again: told to end (SIGTERM), finished work is kept; or another run may still write there
  130  interrupted (Ctrl-C)
  141  the program that read the output ended first, as in `starflow2 config ... | head`"""
RESTART, INTERRUPTED, UNREAD = 75, 130, 141
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1  # seconds
_OUT_OF_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE
)  # the second: a CPU, and some GPU kernels
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def main(argv: list[str] | None = None) -> int:
    """Run a command, and return its exit code (see EXIT_CODES).

    `argv`: the command's name and arguments; None: those of this process, whose signals then become exceptions.
    """
    if argv is not None:
        return _run(argv)
    if not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        _restart_in_utf8_mode()
    code = 0

    def leave() -> None:
        """Keep a signal from changing the exit code while Python takes itself apart, which a signalled process leaves
        out.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if code in (INTERRUPTED, RESTART):
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to run
    _raise_signals()
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again when it exits
        code = UNREAD
    except (KeyboardInterrupt, Terminated) as error:  # a second signal, while the command ended after the first
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else RESTART
    for number in SIGNALS:  # the command has ended; a signal now ends the process at once
        signal.signal(number, lambda *_: os._exit(code))
    return code


def _run(argv: list[str]) -> int:
    """Run a command; errors with a sentence for the user become that sentence and an exit code."""
    command, args = None, argparse.Namespace()
    try:
        commands, parser = _parser()
        if argv[:1] == ["eval"] and argv[1:2] in (["fid"], ["compare"]):
            argv = argv[1:]  # `starflow2 eval fid` is `starflow2 fid`
        args, rest = parser.parse_known_args(argv)
        command = commands.choices[args.command]
        overridden = [r for r in rest if r.startswith("--config.")]
        overrides = [r.removeprefix("--config.") for r in overridden]
        if unknown := [r for r in rest if r not in overridden or not hasattr(args, "config")]:
            command.error(f"unknown argument {unknown[0][:80]!r}")
        from starflow2_jax.extensions import import_file

        for file in args.imports:
            import_file(file)
        args.run(args, overrides)
    except UserError as error:
        return _said(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _said(f"interrupted; {getattr(args, 'kept', 'nothing was written')}", INTERRUPTED)
    except Terminated as error:
        kept = str(error) or getattr(args, "kept", "nothing was written")
        return _said(f"told to end (SIGTERM); {kept}", RESTART)
    except BrokenPipeError:
        raise
    except Exception as error:  # libraries report a full disk and a full GPU by many kinds; all others are raised again
        if cause := refused_write(error):
            path = shorten(getattr(error, "filename", None) or _written(command, args))
            return _said(f"{path} cannot be written: {cause}; {OUT_OF_ROOM}", StorageError.exit_code)
        if isinstance(error, OSError) and error.errno in UNUSABLE:
            path = shorten(error.filename or _written(command, args))
            return _said(f"{path}: {error.strerror}; name another path, or make this one usable", UserError.exit_code)
        if sentence := _memory_fault(error):
            return _said(sentence, 1)
        if _raised_in_settings_of_jax(error):
            return _said(f"JAX cannot start ({' '.join(str(error).split())}); correct this variable, or unset it", 2)
        raise
    return 0


def _parser() -> "tuple[argparse._SubParsersAction, argparse.ArgumentParser]":
    """The commands, and the parser of the whole command line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that PyTorch is missing
    from starflow2_jax import __version__
    from starflow2_jax.commands import (
        bench,
        chat,
        config,
        data,
        encode,
        evaluation,
        plan,
        sampling,
        scores,
        serve,
        sweep,
        training,
        weights,
    )
    from starflow2_jax.commands.arguments import InputFile, Parser

    parser = Parser(
        prog="starflow2",
        description=ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"starflow2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (
        training,
        evaluation,
        scores,
        config,
        data,
        encode,
        sweep,
        plan,
        bench,
        sampling,
        chat,
        serve,
        weights,
    ):
        module.add(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--import",
            dest="imports",
            type=InputFile(),
            metavar="FILE",
            action="append",
            default=[],
            help="Python file to run first, which adds codecs, sources, stages or benchmarks of your own; may be "
            "repeated",
        )
    return commands, parser


def _said(sentence: str, code: int) -> int:
    """Print a sentence on stderr; returns the exit code."""
    print(f"starflow2: {sentence}", file=sys.stderr, flush=True)
    return code


def _written(command: argparse.ArgumentParser | None, args: argparse.Namespace) -> str:
    """The paths that the command line names for writing, in words."""
    from starflow2_jax.commands.arguments import outputs

    return " or ".join(outputs(command, args) if command else []) or "a temporary file"


def _memory_fault(error: Exception) -> str | None:
    """A sentence for the error of a machine, GPU or TPU without free memory; None for another error."""
    if isinstance(error, MemoryError):
        reason = shorten(" ".join(str(error).split()))
        return f"this machine has no memory left ({reason or 'no more is known'}); free some, or use smaller sizes"
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or not _OUT_OF_MEMORY.search(str(error)):
        return None
    from starflow2_jax.parallel.devices import holders

    reason = str(error).splitlines()[0][:200]
    others = [*holders("GPU"), *holders("TPU")]
    whose = f"; it is also in use by process {', '.join(others)}" if others else ""
    return f"the device has no memory left ({reason}){whose}; free some, or use smaller batches or more devices"


def _raised_in_settings_of_jax(error: Exception) -> bool:
    """Whether JAX refuses an environment variable, such as JAX_ENABLE_X64=maybe, while it is imported."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_code.co_filename.endswith(os.path.join("jax", "_src", "config.py"))


def _raise_signals() -> None:
    """Let SIGTERM raise Terminated, as SIGINT raises KeyboardInterrupt, and a second signal end the process at once."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Send a signal again whose exception was raised in a destructor or a callback, where Python drops
        exceptions.
        """
        if unraisable.exc_type in (KeyboardInterrupt, Terminated):
            number = signal.SIGINT if unraisable.exc_type is KeyboardInterrupt else signal.SIGTERM
            # Later, because a signal that comes during this function would be dropped, too.
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        else:
            sys.__unraisablehook__(unraisable)

    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = again
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # Python writes each signal's number there, also while a library runs
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    threading.Thread(target=_end_at_the_second, args=(reading, handlers), daemon=True).start()


def _end_at_the_second(reading: int, handlers: dict[int, object]) -> None:
    """End the process at the second signal, if it has not ended GRACE seconds later: a compiler may hold the main
    thread.

    `reading`: where the numbers of signals arrive. `handlers`: of the signals that count; a command that has set
    others, such as training, decides itself.
    """
    code = 0
    while number := os.read(reading, 1)[0]:
        if signal.getsignal(number) is not handlers.get(number):
            continue
        if code:
            time.sleep(GRACE)
            os._exit(_said("ended at once by the second signal; what was not finished is lost", code))
        code = INTERRUPTED if number == signal.SIGINT else RESTART


def _restart_in_utf8_mode() -> None:
    """Start this process again, with UTF-8 in place of the locale's encoding for arguments, file names and the
    terminal.
    """
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
