"""Joining the processes of a run: what is said on the command line, and what is wrong with it."""

from types import SimpleNamespace

import jax
import pytest

from starflow2_jax import distributed
from starflow2_jax.errors import UserError


def arguments(distributed=True, coordinator=None, processes=None, process=None) -> SimpleNamespace:
    return SimpleNamespace(distributed=distributed, coordinator=coordinator, processes=processes, process=process)


@pytest.fixture
def joined(monkeypatch) -> list:
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: found.append(a))
    for name in distributed.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    return found


def test_nothing_is_guessed(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    distributed.initialize(arguments(distributed=False))
    assert joined == []


def test_flags_environment_and_cluster(joined, monkeypatch):
    distributed.initialize(arguments())
    assert joined == [()]  # JAX asks the cluster
    distributed.initialize(arguments(True, "host:1", "4", "3"))
    assert joined[1:] == [("host:1", 4, 3)]
    for name, value in zip(distributed.ENVIRONMENT.values(), ("other:2", "8", "7"), strict=True):
        monkeypatch.setenv(name, value)
    distributed.initialize(arguments(process="0"))
    assert joined[2:] == [("other:2", 8, 0)]


@pytest.mark.parametrize(
    "given, saying",
    (
        (arguments(False, processes="2"), "add --distributed"),
        (arguments(coordinator="host:1"), "--processes, --process is missing"),
        (arguments(True, "host", "2", "0"), "HOST:PORT"),
        (arguments(True, "host:1", "two", "0"), "are numbers"),
        (arguments(True, "host:1", "2", "2"), "--process=2 must be below --processes=2"),
    ),
)
def test_wrong_use(joined, given, saying):
    with pytest.raises(UserError, match=saying):
        distributed.initialize(given)
    assert joined == []


def test_no_cluster(monkeypatch):
    def fail(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="do not find each other .coordinator_address should be defined."):
        distributed.initialize(arguments())
