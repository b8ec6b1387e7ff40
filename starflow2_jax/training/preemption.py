"""Preemption: SIGTERM announces that the machine will be taken away. The run saves and exits; its launcher restarts
it.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

RESTART = 75  # exit code (EX_TEMPFAIL) after a preemption; starting the same command again resumes the run


class Preempted(Exception):
    """The run received SIGTERM and has saved its state."""


class Preemption:
    """Knows whether this run has received SIGTERM. Use `listening` to make one."""

    def __init__(self):
        self._received = threading.Event()

    @classmethod
    @contextlib.contextmanager
    def listening(cls) -> Iterator["Preemption"]:
        """Catch SIGTERM during the block. In a distributed run, JAX's preemption service catches it for all
        processes.
        """
        notice = cls()
        if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
            yield notice
            return
        before = signal.signal(signal.SIGTERM, lambda *_: notice._received.set())
        try:
            yield notice
        finally:
            signal.signal(signal.SIGTERM, before)

    def reached(self, step: int) -> bool:
        """Whether the run should end after `step`. Every process calls it after every step, and all get True after the
        same.

        From then on it returns True: JAX's service reports one step only, which may be the last one of a task.
        """
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            self._received.set()
        return self._received.is_set()
