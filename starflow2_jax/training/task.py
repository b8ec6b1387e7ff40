"""The protocol of a task, which is what the loop trains. STARFlow2's stages are one kind of task (stage_task.py)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
from flax import struct

from starflow2_jax.checkpoints.directory import CheckpointDirectory


class State(struct.PyTreeNode):
    """A training state. Tasks inherit from it and add fields; each field except `step` and `key` is a group of arrays.

    Checkpoints save every group under its name: "params", "ema", "optimizer", or others that a task needs, such as a
    critic and its optimizer.
    """

    step: jax.Array  # () int32: steps of this task that are done
    key: jax.Array  # of the task's random stream
    params: Any  # the next task may start from them


S = TypeVar("S", bound=State)


class Batches(Protocol):
    """Endless batches. Their position can be saved and restored."""

    documents: dict[str, int]  # in one pass over each source

    def __next__(self) -> Any:
        """The rows of the next batch that this process reads, for `place`."""
        ...

    def place(self, rows: Any, sharding: jax.sharding.NamedSharding, /) -> Any:
        """The whole batch as global arrays, of which this process provides `rows`."""
        ...

    def check(self) -> dict[str, int]:
        """Counts of what was read, for the metrics. All processes call it together.

        Raises UserError, in every process, if the data are too faulty to go on.
        """
        ...

    def close(self) -> None:
        """End the processes that read ahead, if there are any."""
        ...

    def get_state(self) -> Any:
        """The position as a JSON value. All processes call it together."""
        ...

    def set_state(self, state: Any) -> None:
        """Continue from a position."""


# (state, frozen, batch, limit) -> (state, metrics), where the state is donated and its `step` has grown by one.
# `limit`, (): the loss above which the step is a spike (see faults.py). Metrics are scalars; "loss", "grad_norm" and
# "tokens" must be among them. If "targets" is, too, the loop counts the steps whose batch has none, and warns.
Step = Callable[[S, Any, Any, Any], tuple[S, dict[str, jax.Array]]]


class Task(Protocol[S]):
    """What the loop trains: a state, a step, batches, and the state that is saved at the end."""

    name: str  # unique in a run; its metrics and checkpoints have this name
    steps: int

    @property
    def flops(self) -> float:
        """FLOP of one step, all devices together."""
        ...

    def check(self) -> None:
        """Raises UserError for a fault that would stop the task later. It compiles nothing."""

    def continues(self, name: str) -> bool:
        """Whether the task starts from the "params" that the task `name` left. Otherwise it starts from fresh ones."""
        ...

    def abstract_state(self) -> S:
        """Shapes, types and shardings of the state."""
        ...

    def new_state(self, params: Any | None) -> S:
        """The state before the first step, with these parameters (on their shards), or with fresh ones if None."""
        ...

    def frozen(self, checkpoints: CheckpointDirectory) -> Any:
        """The arrays that the step reads and never changes. Step checkpoints do not have them."""
        ...

    def step(self) -> Step[S]:
        """The step function, which is compiled when it is first called."""
        ...

    def check_batch(self, batch: Any) -> None:
        """Raises UserError if the first batch, as global arrays, shows that the task can learn nothing from the
        data.
        """

    def batches(self) -> Batches:
        """Batches from the beginning of the data. Each process reads the rows that its devices need."""
        ...

    def finish(self, state: S, checkpoints: CheckpointDirectory) -> S:
        """The state to save after the last step. Groups that nobody needs any more are empty."""
        ...


def groups(state: State) -> dict[str, Any]:
    """The groups of arrays of a state by name: all fields but `step` and `key`."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in ("step", "key")}
