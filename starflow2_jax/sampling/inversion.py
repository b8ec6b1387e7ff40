"""inversion.json of a checkpoint directory: the solvers of both flows' blocks, chosen by `starflow2 calibrate`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.checkpoints.reading import CheckpointError, read_json
from starflow2_jax.models.jacobi import SEQUENTIAL, Jacobi, Schedule

NAME = "inversion.json"


@dataclass(frozen=True)
class Inversion:
    """The solvers of both flows; the default is token by token."""

    shallow: Schedule | None = None  # one solver for each block; None: token by token
    deep: Jacobi = SEQUENTIAL  # used when SampleOptions.jacobi is 0


def write(folder: Path, report: dict) -> None:
    """Write the report of a calibration into a checkpoint directory."""
    write_whole(folder / NAME, json.dumps(report, indent=1))


def read(folder: Path, blocks: int, step: int | None = None) -> Inversion:
    """The solvers in the file for `blocks` blocks, of which the deep flow is the last; the default if there is no file.

    Warns on stderr if they were measured at another step than `step`. Raises CheckpointError for a damaged file, or one
    of another number of blocks.
    """
    path = folder / NAME
    if not path.exists():
        return Inversion()
    values = cast(Any, read_json(path))
    try:
        solvers = [Jacobi(**block["solver"]) for block in values["blocks"]]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); remove it and calibrate again") from None
    if len(solvers) != blocks:
        raise CheckpointError(
            f"{path} holds solvers for {len(solvers)} blocks, not {blocks}; remove it and calibrate again"
        )
    if step is not None and values.get("step") != step:
        print(
            f"WARNING: {path} was measured at step {values.get('step')}, not {step}; calibrate again", file=sys.stderr
        )
    *shallow, deep = solvers
    return Inversion(tuple(shallow), deep)
