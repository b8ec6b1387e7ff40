"""Profiles of training steps, for xprof."""

from pathlib import Path
from typing import Any

import jax

AFTER = 3  # number of this process's steps before the profile begins, because the first step compiles


class Profiler:
    """Writes a profile of some steps into `folder`, to be opened with xprof or `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: str | Path, steps: int = 0):
        """`steps`: number of steps; 0: no profile."""
        self.folder, self.first, self.last = folder, AFTER, AFTER + steps
        self.done, self.tracing = 0, False

    def step(self, running: Any) -> None:
        """Start or end the profile if it is time. Call it before each step; `running`: arrays that the last step
        computes.
        """
        if self.done == self.first and self.first < self.last:
            jax.block_until_ready(running)
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        elif self.done == self.last:
            self.stop(running)
        self.done += 1

    def stop(self, running: Any = None) -> None:
        """End the profile, if it is being written, when the arrays `running` are computed."""
        if self.tracing:
            jax.block_until_ready(running)
            jax.profiler.stop_trace()
            self.tracing = False
