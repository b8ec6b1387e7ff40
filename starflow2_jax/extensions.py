"""A user's own Python files, which add rows to the tables of codecs, sources, stages and benchmarks (docs/extending.md)."""

import importlib.util
from pathlib import Path
from types import ModuleType

from starflow2_jax.errors import UserError


def import_file(path: str | Path, name: str = "extension") -> ModuleType:
    """Run a Python file that the user named, as a module. Raises UserError where there is none."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise UserError(f"there is no Python file {path} to import")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
