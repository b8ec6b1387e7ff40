"""Being told to end in a distributed run, where JAX's service says so of one step alone."""

import jax
from jax.experimental import multihost_utils

from starflow2_jax.training.preemption import Preemption


def test_who_is_told_once_remembers(monkeypatch):
    """Step 4 may be the last of a stage, after which nobody saves: the next stage's first step must hear of it."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 4)
    with Preemption.listening() as preemption:
        assert [preemption.reached(step) for step in range(1, 8)] == [False] * 3 + [True] * 4
