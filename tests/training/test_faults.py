"""What is a bad step, and what is done about it; where a run's time went."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from starflow2_jax.config.schema import FaultsConfig
from starflow2_jax.errors import UserError
from starflow2_jax.parallel.hardware import peak_flops
from starflow2_jax.training import goodput
from starflow2_jax.training.faults import LossSpike, NonFiniteLoss, Watch, guarded
from starflow2_jax.training.goodput import Ledger


def values(loss: float, grad_norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": grad_norm}


def watch(**changes) -> Watch:
    """One that has seen fifty losses of deviation 0.1 around -2."""
    w = Watch(FaultsConfig(**changes))
    for step, loss in enumerate(np.random.default_rng(0).normal(-2, 0.1, 50), start=1):
        assert w.judge(step, values(float(loss)), "here") is None
    return w


def test_a_spike_is_so_many_deviations_above_the_median():
    w = watch(spike="skip", deviations=6.0)
    assert -2 + 6 * 0.07 < w.limit(52) < -2 + 6 * 0.13  # 0.1 as estimated from 50
    assert w.judge(51, values(-1.6), "here") is None
    assert w.judge(52, values(-5.0), "here") is None  # far below is none
    assert w.judge(53, values(0.0), "here") == "skip"
    assert w.counts == {"nonfinite": 0, "spikes": 1, "skipped": 1, "rollbacks": 0, "without_targets": 0}
    assert 0.0 not in [loss for _, loss in w.losses]  # the next limit does not know it


def test_the_limit_is_of_losses_that_were_known_when_the_step_began():
    w, later = watch(spike="skip"), watch(spike="skip")
    later.judge(51, values(-1.9), "here")
    assert w.limit(52) == later.limit(52)
    assert w.limit(53) != later.limit(53)


def test_without_a_policy_or_enough_losses_nothing_is_a_spike():
    assert watch().limit(60) == math.inf
    few = Watch(FaultsConfig(spike="skip"))
    for step in range(1, 20):
        few.judge(step, values(1.0), "here")
    assert few.limit(21) == math.inf


def test_policies():
    with pytest.raises(NonFiniteLoss, match="nan.*at here: lower"):
        watch().judge(51, values(float("nan")), "here")
    with pytest.raises(LossSpike, match="above the limit"):
        watch(spike="abort").judge(51, values(9.0), "here")
    assert watch(nonfinite="skip").judge(51, values(1.0, math.inf), "here") == "skip"
    assert watch(nonfinite="rollback").judge(51, values(math.inf), "here") == "rollback"
    with pytest.raises(UserError, match="nonfinite must be one of"):
        FaultsConfig(nonfinite="ignore")


def test_too_many_bad_steps_end_the_run():
    w = watch(nonfinite="skip", most=2)
    for step in (51, 52):
        assert w.judge(step, values(math.nan), "here") == "skip"
    with pytest.raises(LossSpike, match="faults.most=2"):
        w.judge(53, values(math.nan), "here")


def test_a_watch_goes_on_from_its_state():
    w = watch(spike="rollback", nonfinite="skip")
    w.judge(51, values(math.nan), "here")
    again = Watch(FaultsConfig(spike="rollback", nonfinite="skip"), w.state())
    assert again.limit(60) == w.limit(60) and again.counts == w.counts
    w.rewind(30)
    assert [step for step, _ in w.losses][-1] == 30 and again.losses[-1][0] == 50


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict
    optimizer: dict


@struct.dataclass
class Batch:
    segments: jax.Array
    loss: jax.Array


@pytest.mark.parametrize(
    "policy, loss, applied",
    (
        (dict(nonfinite="skip"), 1.0, True),
        (dict(nonfinite="skip"), math.nan, False),
        (dict(nonfinite="skip"), 99.0, True),
        (dict(spike="skip"), 99.0, False),
        (dict(spike="skip"), 1.0, True),
        (dict(spike="rollback"), 99.0, True),
        (dict(nonfinite="skip", spike="skip"), math.inf, False),
    ),
)
def test_a_bad_update_is_not_applied(policy, loss, applied):
    def step(state, frozen, batch):
        new = jax.tree.map(lambda x: x + batch.loss, (state.params, state.ema, state.optimizer))
        new = State(state.step + 1, *new)
        return new, {"loss": batch.loss, "grad_norm": jnp.float32(1)}

    def tree(x: float) -> dict:
        return {"a": jnp.full(3, x)}

    state = State(jnp.int32(4), tree(1.0), tree(2.0), tree(3.0))
    batch = Batch(jnp.array([[1, 1, 0], [2, 0, 0]]), jnp.float32(loss))
    new, _ = jax.jit(guarded(step, FaultsConfig(**policy)))(state, {}, batch, np.float32(10.0))
    assert int(new.step) == 5
    added = loss if applied else 0.0
    for tree, before in ((new.params, 1.0), (new.ema, 2.0), (new.optimizer, 3.0)):
        np.testing.assert_array_equal(np.asarray(tree["a"]), np.full(3, before + added, np.float32))


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)


class Running:
    def __init__(self, ready: bool):
        self.is_ready = lambda: ready


def test_time_is_spent_once(monkeypatch):
    clock = Clock(monkeypatch)
    ledger = Ledger()
    with ledger.time("checkpoint"):
        clock.now += 2
        with ledger.time("restart"):
            clock.now += 3
    for ready, seconds in ((True, 1), (False, 5)):  # behind a running step nobody waits for input
        with ledger.waiting(Running(ready)):
            clock.now += seconds
    clock.now += 4
    wanted = {"steps": 9, "input": 1, "evals": 0, "checkpoint": 2, "compile": 0, "restart": 3, "total": 15}
    assert ledger.split() == wanted


def test_what_a_fault_cost_is_counted_as_restart(monkeypatch):
    clock = Clock(monkeypatch)
    ledger = Ledger()
    clock.now += 10
    ledger.steps, ledger.tokens = 5, 100.0
    saved, ended = ledger.state(), ledger.state(ended=True)
    clock.now += 30  # steps that are lost, and nobody there
    again = Ledger(saved)
    clock.now += 10
    again.steps += 5
    assert again.split() == {
        "steps": 20,
        "input": 0,
        "evals": 0,
        "checkpoint": 0,
        "compile": 0,
        "restart": 30,
        "total": 50,
    }
    assert again.restarts == 1 and again.summary(None)["share"]["restart"] == 0.6
    orderly = Ledger(ended)
    assert orderly.split()["total"] == 10 and orderly.restarts == 0


def test_steps_that_are_lost_count_nowhere(monkeypatch):
    """Five steps, saved; three more that the run goes back from: speed and MFU are of the five."""
    clock = Clock(monkeypatch)
    ledger = Ledger()

    def steps(count: int) -> None:
        for _ in range(count):
            with ledger.waiting(None):
                clock.now += 1
            clock.now += 3
            ledger.steps, ledger.tokens, ledger.flops = ledger.steps + 1, ledger.tokens + 10, ledger.flops + 7.0

    steps(5)
    ledger.state()
    before = ledger.summary(1.0)
    steps(3)
    ledger.rewind()
    after = ledger.summary(1.0)
    assert ledger.split() == {
        "steps": 15,
        "input": 5,
        "evals": 0,
        "checkpoint": 0,
        "compile": 0,
        "restart": 12,
        "total": 32,
    }
    for name in ("steps", "step_seconds", "input_wait_seconds", "tokens_per_second", "mfu"):
        assert after[name] == before[name]


def test_compilation_is_noticed():
    ledger = Ledger()
    with ledger.noticing_compilations(), ledger.time("checkpoint"):
        jax.jit(lambda x: x * 2.5 + 1)(jnp.ones(3)).block_until_ready()
    spent = ledger.split()
    assert spent["compile"] > 0
    assert spent["compile"] + spent["checkpoint"] <= spent["total"] + 1e-6


def test_mfu_is_of_the_time_in_steps_and_input():
    spent = {"steps": 8.0, "input": 2.0, "evals": 0.0, "checkpoint": 5.0, "compile": 1.0, "restart": 0.0, "total": 16.0}
    found = goodput.rates(spent, 5, 1000.0, flops=4e12 * jax.device_count(), peak=1e12)
    assert found == {"step_seconds": 2.0, "input_wait_seconds": 0.4, "tokens_per_second": 100.0, "mfu": 0.4}
    assert "mfu" not in goodput.rates(spent, 5, 1000.0, 1e12, None)
    assert peak_flops() is None and peak_flops(5.0) == 5.0  # a CPU is in no table
