"""Several processes that train one model: how they find each other, and how they agree on a value."""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from starflow2_jax.errors import UserError

ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


def initialize(args: argparse.Namespace) -> None:
    """Join the other processes if `--distributed` is given. Must be called before JAX starts. Raises UserError."""
    flags = {name: getattr(args, name) for name in ENVIRONMENT}
    if not args.distributed:
        if given := [f"--{name}" for name, value in flags.items() if value is not None]:
            raise UserError(f"{', '.join(given)} belongs to a distributed run; add --distributed")
        return
    values = {
        name: os.environ.get(ENVIRONMENT[name], "") if flag is None else str(flag) for name, flag in flags.items()
    }
    if missing := [f"--{name}" for name, value in values.items() if not value]:
        if len(missing) < len(values):
            raise UserError(
                f"{', '.join(missing)} is missing; give all of --coordinator, --processes, --process or none"
            )
        _join()
        return
    coordinator, processes, process = (values[name] for name in ENVIRONMENT)
    if not processes.isdigit() or not process.isdigit() or ":" not in coordinator:
        raise UserError("--coordinator must be HOST:PORT, --processes and --process must be numbers")
    if int(process) >= int(processes):
        raise UserError(f"--process={process} must be below --processes={processes}")
    _join(coordinator, int(processes), int(process))


def _join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes; without arguments, as JAX finds them out. Raises UserError if they are not found."""
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes do not find each other ({reason}); name them by --coordinator, --processes and --process"
        ) from None


def primary() -> bool:
    """Whether this is process 0, which alone writes configs, metrics and the progress bar."""
    return jax.process_index() == 0


def on_primary(work: Callable[[], Any]) -> Any:
    """Do `work` in process 0 alone; every process waits for it and returns the JSON value that it returned.

    Use it for anything that depends on the files in a directory: for a while, hosts may see different states of a
    network file system. A UserError that `work` raises is raised in every process.
    """
    answer = error = None
    if primary():
        try:
            answer = work()
        except UserError as raised:
            error = raised
    answer, fault = gather((answer, error and str(error)))[0]
    if fault is not None:
        raise error or UserError(fault)
    return answer


def gather(value: Any) -> list:
    """Collect a JSON value from each process: the list of all of them, by process index, in every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - len(text))))
    rows = rows.reshape(len(lengths), -1)
    return [json.loads(bytes(row[:length].astype(np.uint8))) for row, length in zip(rows, lengths, strict=True)]
