"""A machine that will be taken away sends SIGTERM. The run then saves and exits, and its launcher starts it again."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

RESTART = 75  # exit code (EX_TEMPFAIL): everything is saved; start the run again


class Preempted(Exception):
    """The run received SIGTERM and has saved its state."""


class Preemption:
    def __init__(self):
        self._received = threading.Event()

    @classmethod
    @contextlib.contextmanager
    def listening(cls) -> Iterator["Preemption"]:
        """Notice SIGTERM during the block. In a distributed run JAX's own service notices it and informs all processes."""
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
        """Whether the run should end after `step`. Every process asks after every step; all get True after the same step.

        From then on the answer stays True, because JAX's service answers so for one step only, which may end a stage.
        """
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            self._received.set()
        return self._received.is_set()
