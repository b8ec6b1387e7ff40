"""inversion.json of a checkpoint directory: how each block of both flows is inverted, as `starflow2 calibrate` measured it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from starflow2_jax.checkpoints.reading import CheckpointError, read_json
from starflow2_jax.models.jacobi import SEQUENTIAL, Jacobi, Schedule

NAME = "inversion.json"


@dataclass(frozen=True)
class Inversion:
    """How both flows are inverted; the default is token by token."""

    shallow: Schedule | None = None  # one solver a block; None: token by token
    deep: Jacobi = SEQUENTIAL  # where SampleOptions.jacobi does not say


def write(folder: Path, report: dict) -> None:
    (folder / NAME).write_text(json.dumps(report, indent=1), encoding="utf-8")


def read(folder: Path, blocks: int, step: int | None = None) -> Inversion:
    """The solvers that were chosen for flows of `blocks` blocks, the deep flow last; the default without inversion.json.

    Warns on stderr if they were measured at another step than `step`. Raises CheckpointError.
    """
    path = folder / NAME
    if not path.exists():
        return Inversion()
    values = read_json(path)
    try:
        solvers = [Jacobi(**block["solver"]) for block in values["blocks"]]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); remove it and calibrate again") from None
    if len(solvers) != blocks:
        raise CheckpointError(
            f"{path} is of flows of {len(solvers)} blocks, not {blocks}; remove it and calibrate again"
        )
    if step is not None and values.get("step") != step:
        print(
            f"WARNING: {path} was measured at step {values.get('step')}, not {step}; calibrate again", file=sys.stderr
        )
    *shallow, deep = solvers
    return Inversion(tuple(shallow), deep)
