"""A machine that is to be taken away sends SIGTERM: the run saves, and exits so that its launcher starts it again."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

RESTART = 75  # exit code (EX_TEMPFAIL): all is saved, start me again


class Preempted(Exception):
    """The run was told to end; its state is saved."""


class Preemption:
    def __init__(self):
        self._told = threading.Event()

    @classmethod
    @contextlib.contextmanager
    def listening(cls) -> Iterator["Preemption"]:
        """Notice SIGTERM while this lasts. In a distributed run JAX's own service does, and tells all processes."""
        notice = cls()
        if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
            yield notice
            return
        before = signal.signal(signal.SIGTERM, lambda *_: notice._told.set())
        try:
            yield notice
        finally:
            signal.signal(signal.SIGTERM, before)

    def reached(self, step: int) -> bool:
        """Is the run to end after `step`? Every process asks after every step, and all hear yes after the same one.

        From then on the answer stays yes: JAX's service says it of one step only, which may be a stage's last.
        """
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            self._told.set()
        return self._told.is_set()
