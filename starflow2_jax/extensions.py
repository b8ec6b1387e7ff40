"""Runs Python files of users: experiments, sweeps, and extensions, which add rows to the tables of codecs, sources,
stages and benchmarks (docs/extending.md)."""

import importlib.util
import traceback
from pathlib import Path
from types import ModuleType

from starflow2_jax.errors import UserError

LARGEST = 2**24  # bytes of a Python file


def import_file(path: str | Path, name: str = "extension", error: type[UserError] = UserError) -> ModuleType:
    """Run a Python file, and return it as a module called `name`.

    Raises `error`, whose message names the file and the line, if there is no such file or if it fails. A UserError that
    the file itself raises passes through.
    """
    if not Path(path).is_file():
        raise error(f"there is no Python file {path}; check the path")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise error(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    if (size := Path(path).stat().st_size) > LARGEST:
        raise error(f"{path} has {size} bytes, which is too long for a Python file; check the path")
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except SyntaxError as fault:
        raise error(f"{path} is not valid Python (line {fault.lineno}: {fault.msg})") from None
    except Exception as fault:  # the file is the user's, so it may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(fault.__traceback__) if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        reason = " ".join(str(fault).split())[:300]
        raise error(f"{path} fails{where}: {type(fault).__name__}: {reason}") from None
    return module
