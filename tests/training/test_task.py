"""The loop trains other kinds of tasks than stages: here two models against each other, two optimizers in one pure
step.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.config.schema import FaultsConfig
from starflow2_jax.parallel import sharding
from starflow2_jax.random_streams import stream_key
from starflow2_jax.training.faults import guarded
from starflow2_jax.training.loop import train
from starflow2_jax.training.run import Settings
from starflow2_jax.training.task import State, groups

MESH = sharding.make_mesh(devices=jax.devices()[:2])
MAKER, CRITIC = optax.adam(1e-2), optax.sgd(1e-1, momentum=0.9)
FAULTS = FaultsConfig()
BAD = 1000  # a batch with this number in it makes the loss infinite


class Pair(State):
    """A maker and the critic that it is trained against."""

    critic: dict
    optimizer: optax.OptState
    critic_optimizer: optax.OptState


class Numbers:
    """Batches of eight numbers that count on; `place` hands out global arrays."""

    documents = {"numbers": 8}

    def __init__(self, bad: int | None = None):
        self.at, self.bad = 0, bad

    def __next__(self) -> np.ndarray:
        self.at += 1
        last = BAD if self.at == self.bad else self.at
        return np.array([self.at, 2, 3, 4, 5, 6, 7, last], np.float32)

    def place(self, rows, layout):
        return jax.device_put(rows, layout)

    def check(self) -> dict[str, int]:
        return {"numbers": self.at}

    def close(self) -> None:
        pass

    def get_state(self) -> int:
        return self.at

    def set_state(self, state: int) -> None:
        self.at = state


class Duel:
    flops = 1.0

    def __init__(self, name: str, steps: int, bad: int | None = None, faults: FaultsConfig = FAULTS):
        self.name, self.steps, self.bad, self.faults = name, steps, bad, faults

    def check(self) -> None:
        pass

    def check_batch(self, batch: jax.Array) -> None:
        assert isinstance(batch, jax.Array) and batch.shape == (8,)

    def continues(self, name: str) -> bool:
        return name == "first"

    def _make(self, params: dict, key: jax.Array) -> Pair:
        critic = {"w": jnp.ones(3)}
        return Pair(jnp.int32(0), key, params, critic, MAKER.init(params), CRITIC.init(critic))

    def abstract_state(self) -> Pair:
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(self._make, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, key)
        return sharding.placed(state, sharding.replicated(MESH))

    def new_state(self, params: dict | None) -> Pair:
        params = {"w": jnp.zeros(3)} if params is None else params
        make = jax.jit(self._make, out_shardings=sharding.replicated(MESH))
        return make(params, stream_key(0, "duel", self.name))

    def frozen(self, checkpoints: CheckpointDirectory) -> dict:
        return {"scale": jnp.float32(0.01)}

    def step(self):
        def step(state: Pair, frozen: dict, batch):
            target = frozen["scale"] * jnp.sum(batch) + jax.random.normal(jax.random.fold_in(state.key, state.step))

            def makers(params, critic):
                return jnp.sum(critic["w"] * (params["w"] - target) ** 2)

            def critics(critic, params):
                return jnp.sum((critic["w"] - params["w"]) ** 2)

            loss, gradient = jax.value_and_grad(makers)(state.params, state.critic)
            critic_loss, critic_gradient = jax.value_and_grad(critics)(state.critic, state.params)
            moves, optimizer = MAKER.update(gradient, state.optimizer)
            critic_moves, critic_optimizer = CRITIC.update(critic_gradient, state.critic_optimizer)
            loss = jnp.where(jnp.any(batch == BAD), jnp.inf, loss)
            new = state.replace(
                step=state.step + 1,
                params=optax.apply_updates(state.params, moves),
                critic=optax.apply_updates(state.critic, critic_moves),
                optimizer=optimizer,
                critic_optimizer=critic_optimizer,
            )
            metrics = {"loss": loss, "critic_loss": critic_loss, "grad_norm": optax.tree.norm(gradient)}
            return new, metrics | {"tokens": jnp.float32(len(batch))}

        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        return jax.jit(guarded(step, self.faults), donate_argnums=0, out_shardings=(layout, None))

    def batches(self) -> Numbers:
        return Numbers(self.bad)

    def finish(self, state: Pair, checkpoints: CheckpointDirectory) -> Pair:
        """The critic has done its work."""
        return state.replace(critic={}, optimizer={}, critic_optimizer={})


def run(
    folder: Path, stop_at: int | None = None, save_every: int = 3, faults: FaultsConfig = FAULTS, **options
) -> dict:
    tasks = [Duel("first", 4), Duel("second", 6, faults=faults, **options)]
    settings = Settings(log_every=1, save_every=save_every, faults=faults)
    return train(tasks, CheckpointDirectory(folder), MESH, settings, progress=False, stop_at=stop_at)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


def left(folder: Path) -> dict:
    steps = CheckpointDirectory(folder).steps
    return steps.restore(10, {"params": Duel("second", 6).abstract_state().params})["params"]


def test_a_stopped_run_goes_on_as_if_undisturbed(tmp_path):
    """Stopped at the end of the first task, in the middle of the second where it saves, and between two saves."""
    run(tmp_path / "whole")
    for stop_at in (4, 6, 7, None):
        run(tmp_path / "parts", stop_at)
        assert CheckpointDirectory(tmp_path / "parts").steps.latest() == (stop_at or 10)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["stage"] for line in lines(tmp_path / "whole")] == ["first"] * 4 + ["second"] * 6
    assert len({line["critic_loss"] for line in lines(tmp_path / "whole")}) == 10
    np.testing.assert_array_equal(left(tmp_path / "parts")["w"], left(tmp_path / "whole")["w"])


def test_checkpoints_hold_every_group_under_its_name(tmp_path):
    run(tmp_path)
    steps = CheckpointDirectory(tmp_path).steps
    names = ("params", "critic", "optimizer", "critic_optimizer")
    held = {number: [name for name in names if steps.has(number, name)] for number in (4, 9, 10)}
    assert held == {4: ["params"], 9: list(names), 10: ["params"]}
    assert set(groups(Duel("first", 4).abstract_state())) == set(names)
    meta = steps.meta(9)
    assert (meta["stage"], meta["stage_step"], meta["data"]) == ("second", 5, 5)


def test_a_task_starts_from_the_parameters_that_it_continues(tmp_path, monkeypatch):
    begun = []
    new_state = Duel.new_state
    monkeypatch.setattr(Duel, "new_state", lambda self, params: begun.append(params) or new_state(self, params))
    run(tmp_path / "on")
    assert begun[0] is None and float(begun[1]["w"][0]) != 0
    monkeypatch.setattr(Duel, "continues", lambda self, name: False)
    run(tmp_path / "anew")
    assert begun[2:] == [None, None]


@pytest.mark.parametrize("policy", ("skip", "rollback"))
def test_a_bad_batch_touches_none_of_the_groups(tmp_path, policy):
    """Skipped, or gone back from: what is left is finite, in both models."""
    faults = FaultsConfig(nonfinite=policy)
    summary = run(tmp_path, faults=faults, bad=4, save_every=1)
    assert summary["faults"]["nonfinite"] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(left(tmp_path)))
    good = [line for line in lines(tmp_path) if np.isfinite(line["loss"])]
    assert len(good) == (9 if policy == "skip" else 10)
    assert all(np.isfinite(line["critic_loss"]) for line in good)


def test_a_skipped_update_leaves_the_whole_state(tmp_path):
    task = Duel("second", 6, faults=FaultsConfig(nonfinite="skip"))
    state = task.new_state(None)
    before = jax.device_get(groups(state))
    for number, moved in ((BAD, False), (1, True)):
        batch = jax.device_put(np.full(8, number, np.float32), sharding.batch_sharding(MESH))
        state, _ = task.step()(state, task.frozen(None), batch, np.float32(np.inf))
        after = jax.device_get(groups(state))
        same = jax.tree.map(partial(np.array_equal), before, after)
        assert {name: jax.tree.all(tree) for name, tree in same.items()} == dict.fromkeys(before, not moved)
    assert int(state.step) == 2
