"""The task, which the loop trains. STARFlow2's stages are one kind of task (stage_task.py); others, such as a codec, fit, too."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from starflow2_jax.checkpoints.directory import CheckpointDirectory


class State(Protocol):
    """A training state, a `flax.struct.dataclass`. Each field besides `step` and `key` is a group of arrays.

    Checkpoints hold every group under its name: "params", "ema", "optimizer", or others that a task needs, such as a critic
    and its optimizer. The group "params" is the one that the next task may start from.
    """

    step: jax.Array  # () int32: steps of this task that were done
    key: jax.Array  # of the task's random stream
    params: Any
    replace: Callable[..., "State"]


class Batches(Protocol):
    """Endless batches. Their position can be saved and restored."""

    documents: dict[str, int]  # of one pass over each source

    def __next__(self) -> Any:
        """The rows of the next batch that this process reads."""
        ...

    def place(self, rows: Any, sharding: jax.sharding.NamedSharding) -> Any:
        """Make the whole batch, as global arrays, from those rows."""
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


# (state, frozen, batch, limit) -> (state, metrics). It advances state.step by one. Metrics are scalars: "loss" and
# "grad_norm", by which bad steps are judged, "tokens", from which the speed is computed, and any others; where there is
# "targets", a step with 0 of them is counted and warned about. `limit` () is the loss above which a step is a spike (see
# faults.py). The state is donated.
Step = Callable[[State, Any, Any, Any], tuple[State, dict[str, jax.Array]]]


class Task(Protocol):
    """One entry of a run's order: its state, its step, its batches, and the state that it leaves at the end."""

    name: str  # unique in a run: names its metrics, checkpoints and random streams
    steps: int
    flops: float  # of one step, all devices together

    def check(self) -> None:
        """Raises UserError for a fault that would stop the task later. It compiles nothing."""

    def continues(self, name: str) -> bool:
        """Whether the task starts from the "params" that the task `name` left. Otherwise it starts from fresh ones."""

    def abstract_state(self) -> State:
        """Shapes, types and shardings of the state."""
        ...

    def new_state(self, params: Any | None) -> State:
        """The state before the first step, with these parameters (on their shards) or fresh ones."""
        ...

    def frozen(self, checkpoints: CheckpointDirectory) -> Any:
        """The arrays that the step reads and never changes. The saved steps do not hold them."""
        ...

    def step(self) -> Step:
        """The step. It is compiled when it is first called."""
        ...

    def check_batch(self, batch: Any) -> None:
        """Raises UserError if the task's first batch, as global arrays, shows that the data cannot teach anything."""

    def batches(self) -> Batches:
        """Batches from the beginning of the data. Each process reads the rows that its devices need."""
        ...

    def finish(self, state: State, checkpoints: CheckpointDirectory) -> State:
        """The state to save after the last step. Groups that are not needed any more are empty in it."""
        ...


def groups(state: State) -> dict[str, Any]:
    """The groups of arrays of a state by name: all fields but `step` and `key`."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in ("step", "key")}
