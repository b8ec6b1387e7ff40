"""A trace of some steps, for xprof."""

from pathlib import Path

import jax

AFTER = 3  # steps of this process before the trace begins: the first ones compile


class Profiler:
    """Traces `steps` steps into `folder`, for xprof or `tensorboard --logdir FOLDER`. With 0 it traces nothing."""

    def __init__(self, folder: str | Path, steps: int = 0):
        self.folder, self.first, self.last = folder, AFTER, AFTER + steps
        self.done, self.tracing = 0, False

    def step(self, running) -> None:
        """Call it before each step. `running`: the result of the step before."""
        if self.done == self.first and self.first < self.last:
            jax.block_until_ready(running)
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        elif self.done == self.last:
            self.stop(running)
        self.done += 1

    def stop(self, running=None) -> None:
        if self.tracing:
            jax.block_until_ready(running)
            jax.profiler.stop_trace()
            self.tracing = False
