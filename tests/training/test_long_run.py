"""What a long run lives through: bad batches, damaged checkpoints, SIGTERM; with a Trainer whose step is a small
stand-in.
"""

import json
import math
import os
import shutil
import signal
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from stand_in import BAD, Documents, applied, lines, with_stand_ins
from tensorboardX.proto.event_pb2 import Event
from tiny_experiment import tiny_config

from starflow2_jax.checkpoints import file_list
from starflow2_jax.checkpoints.damage import pass_over_damaged
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.reading import CheckpointError
from starflow2_jax.checkpoints.retention import Keep
from starflow2_jax.data.documents import Text
from starflow2_jax.models.flops import training_flops
from starflow2_jax.stages import STAGES
from starflow2_jax.training import program, stage_task
from starflow2_jax.training.faults import LossSpike, NonFiniteLoss
from starflow2_jax.training.goodput import Ledger
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.preemption import Preempted


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(Documents, "bad", -1)
    return lambda **changes: with_stand_ins(monkeypatch, tmp_path / "run", **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[dict], float]:
    """The log of a run to which nothing happens, and the tokens that its steps had up to a saved one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        t = with_stand_ins(monkeypatch, tmp_path_factory.mktemp("undisturbed") / "run")
        t.run(progress=False)
        return lines(t), applied(t)


FAULTS = dict(deviations=50.0, window=5, most=3)


@pytest.mark.parametrize("bad_loss, kind", ((math.nan, "nonfinite"), (1e4, "spikes")))
def test_a_bad_batch_is_skipped_and_counted(trainer, monkeypatch, bad_loss, kind):
    monkeypatch.setattr(Documents, "bad", 300)
    monkeypatch.setattr(Documents, "bad_loss", bad_loss)
    t = trainer(faults=dict(nonfinite="skip", spike="skip", **FAULTS))
    summary = t.run(progress=False)
    [bad] = [line for line in lines(t) if not math.isfinite(line["loss"]) or line["loss"] > 2]
    assert 4 < bad["step"] < 12 and summary["faults"] == {"nonfinite": 0, "spikes": 0, "rollbacks": 0, "without_targets": 0} | {
        kind: 1, "skipped": 1
    }  # fmt: skip
    assert applied(t) == sum(line["tokens"] for line in lines(t)[:12] if line["step"] != bad["step"])
    assert lines(t)[-1]["step"] == 16 and lines(t)[-1][kind] == 1


def test_a_bad_batch_is_passed_over_from_the_last_checkpoint(trainer, monkeypatch):
    """The run goes back to step 4 or 8 and on with the data behind the bad batch: parameters know nothing of it."""
    monkeypatch.setattr(Documents, "bad", 300)
    monkeypatch.setattr(Documents, "bad_loss", math.nan)
    t = trainer(faults=dict(nonfinite="rollback", spike="ignore", **FAULTS))
    summary = t.run(progress=False)
    assert summary["faults"] == {"nonfinite": 1, "spikes": 0, "skipped": 0, "rollbacks": 1, "without_targets": 0}
    assert [line["step"] for line in lines(t)] == list(range(1, 17))
    assert all(math.isfinite(line["loss"]) for line in lines(t))
    assert applied(t) == sum(line["tokens"] for line in lines(t)[:12])
    assert summary["steps"] == 16 and summary["seconds"]["restart"] > 0


def test_after_going_back_speed_is_of_the_steps_since(trainer, monkeypatch):
    """Logs at every third step, saves at every fourth; what was lost is in none of the logs' time or counts."""
    monkeypatch.setattr(Documents, "bad", 300)
    monkeypatch.setattr(Documents, "bad_loss", math.nan)
    logs, marks, rewind, speed = [], [0], Ledger.rewind, Ledger.speed

    def rewound(self):
        rewind(self)
        marks.append(self.steps)

    def logged(self, before, steps, tokens, *arguments):
        logs.append((steps, self.steps - marks[-1], tokens, self.split()["restart"] - before["restart"]))
        marks.append(self.steps)
        return speed(self, before, steps, tokens, *arguments)

    monkeypatch.setattr(Ledger, "rewind", rewound)
    monkeypatch.setattr(Ledger, "speed", logged)
    t = trainer(log_every=3, faults=dict(nonfinite="rollback", spike="ignore", **FAULTS))
    summary = t.run(progress=False)
    assert summary["faults"]["rollbacks"] == 1 and any(steps not in (1, 3) for steps, *_ in logs)
    assert all(steps == since for steps, since, *_ in logs)
    assert all(restart == 0 for *_, restart in logs)
    assert all(200 < tokens / steps < 8 * 72 for steps, _, tokens, _ in logs)


@pytest.mark.parametrize(
    "policy, error, left",
    (
        (dict(nonfinite="abort"), NonFiniteLoss, "there is no checkpoint yet"),
        (dict(nonfinite="skip"), LossSpike, "the last good checkpoint is step"),
    ),
)
def test_no_end_of_bad_batches_ends_the_run(trainer, monkeypatch, policy, error, left):
    monkeypatch.setattr(Documents, "__getitem__", lambda self, i: [Text(f"{i} " + BAD * (i > 250), predict=True)])
    monkeypatch.setattr(Documents, "bad_loss", math.nan)
    t = trainer(faults=FAULTS | policy)
    with pytest.raises(error, match=rf"\(pretrain\); {left}"):
        t.run(progress=False)


def test_which_steps_stay(tmp_path):
    """The newest, every tenth, the one of the lowest loss (of the later stage, whatever its losses)."""
    c = CheckpointDirectory(tmp_path, Keep(latest=1, every=10, best=1))
    losses = {5: (0, 0.1), 10: (0, 0.9), 15: (1, 3.0), 20: (1, 2.5), 25: (1, 1.0), 30: (1, 2.0), 35: (1, 4.0)}
    for number, (stage, loss) in losses.items():
        c.steps.save(number, {"params": {"a": jnp.ones(2)}}, {}, {"stage": stage, "loss": loss})
    c.steps.wait()
    assert sorted(c.steps.manager.all_steps()) == [10, 20, 25, 30, 35]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    """Steps 1, 2, 3, whose parameter is their number."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    c = CheckpointDirectory(folder)
    c.create(tiny_config(), tiny.CODEC, tiny.tokenizer())
    for number in (1, 2, 3):
        c.steps.save(number, {"params": {"a": jnp.full(50, number)}}, {"stage": "joint"})
    c.steps.close()
    return folder


def step_files() -> list[str]:
    """By what they are for; the names of data files are random."""
    return ["meta/metadata", "params/_METADATA", "params/manifest.ocdbt", "params/d", "_CHECKPOINT_METADATA"]


def damage(step: Path, name: str, how: str) -> None:
    path = step / name
    path = sorted(p for p in path.rglob("*") if p.is_file())[0] if path.is_dir() else path
    if how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ("cut", "missing", "flipped"))
@pytest.mark.parametrize("name", step_files())
def test_a_damaged_step_is_passed_over(three_steps, tmp_path, capfd, name, how):
    folder = Path(shutil.copytree(three_steps, tmp_path / "run"))
    damage(folder / "steps" / "3", name, how)
    assert CheckpointDirectory(folder).require_latest() == 2  # who samples changes nothing
    said = capfd.readouterr().err
    assert "WARNING: step 3" in said and "is damaged" in said
    c = CheckpointDirectory(folder)
    assert c.steps.latest() == 3
    pass_over_damaged(c.steps)
    assert c.steps.latest() == 2 and (folder / "damaged" / "3.0").is_dir()
    spread = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": {"a": jax.ShapeDtypeStruct((50,), jnp.int32, sharding=spread)}}
    assert int(c.steps.restore(2, wanted)["params"]["a"][7]) == 2
    c.steps.save(3, {"params": {"a": jnp.full(50, 30)}}, {"stage": "joint"})  # its number is free again
    c.steps.close()
    assert CheckpointDirectory(folder).require_latest() == 3
    damage(folder / "steps" / "3", "meta/metadata", "cut")
    c = CheckpointDirectory(folder)
    pass_over_damaged(c.steps)
    assert (folder / "damaged" / "3.1").is_dir()


def test_one_bit_of_a_large_file(tmp_path):
    """Larger than what is read at a time, and not looked at where it is not to be read."""
    step, name = tmp_path / "7", "optimizer/d/0"
    (step / "optimizer" / "d").mkdir(parents=True)
    (step / name).write_bytes(bytes(file_list.PIECE + 5))
    file_list.write(step)
    assert file_list.fault(step) is None
    damage(step, name, "flipped")
    assert file_list.fault(step) == f"{name} is changed"
    assert file_list.fault(step, unread=("optimizer",)) is None


def test_no_step_is_whole(three_steps, tmp_path):
    folder = Path(shutil.copytree(three_steps, tmp_path / "run"))
    for number in (1, 2, 3):
        damage(folder / "steps" / str(number), "params/_METADATA", "missing")
    for use in (CheckpointDirectory.require_latest, lambda c: pass_over_damaged(c.steps)):
        with pytest.raises(CheckpointError, match="every saved step .* is damaged .3, 2, 1."):
            use(CheckpointDirectory(folder))


def test_a_step_that_is_being_written_is_none(three_steps, tmp_path):
    folder = Path(shutil.copytree(three_steps, tmp_path / "run"))
    (folder / "steps" / "3").rename(folder / "steps" / "3.orbax-checkpoint-tmp")
    assert CheckpointDirectory(folder).require_latest() == CheckpointDirectory(folder).steps.latest() == 2


@pytest.mark.parametrize("number", (2, 3))
def test_a_step_that_is_there_or_passed_is_not_saved_in_silence(three_steps, number):
    c = CheckpointDirectory(three_steps)
    with pytest.raises(CheckpointError, match=f"step {number} cannot be saved in .* holds step 3 already"):
        c.steps.save(number, {"params": {"a": jnp.full(50, 7)}}, {"stage": "joint"})
    c.steps.close()


def test_a_step_without_a_list_of_files_is_used(three_steps, tmp_path):
    folder = Path(shutil.copytree(three_steps, tmp_path / "run"))
    (folder / "steps" / "3" / file_list.NAME).unlink()
    assert CheckpointDirectory(folder).require_latest() == 3


def test_a_run_goes_on_from_the_step_before_a_damaged_one(trainer, undisturbed, capfd):
    trainer().run(progress=False, stop_at=8)
    damage(trainer().checkpoints.folder / "steps" / "8", "params/d", "cut")
    t = trainer()
    t.run(progress=False)
    assert "step 8" in capfd.readouterr().err
    assert (lines(t), applied(t)) == undisturbed and undisturbed[1] > 0


@pytest.mark.parametrize("listed", (True, False))
def test_a_step_whose_list_was_never_written_is_read_first(trainer, undisturbed, capfd, listed):
    """Killed between the two; its data is damaged, the one before is whole, with a list or without."""
    trainer().run(progress=False, stop_at=8)
    steps = trainer().checkpoints.folder / "steps"
    (steps / "8" / file_list.NAME).unlink()
    if not listed:
        (steps / "4" / file_list.NAME).unlink()
    damage(steps / "8", "params/d", "cut")
    t = trainer()
    t.run(progress=False)
    said = capfd.readouterr().err
    assert "WARNING: step 8" in said and "trying the step before" in said and "step 4" not in said
    assert [place.name for place in (t.checkpoints.folder / "damaged").iterdir()] == ["8.0"]
    assert (lines(t), applied(t)) == undisturbed and undisturbed[1] > 0


def test_the_only_step_stays_where_it_is(trainer):
    trainer().run(progress=False, stop_at=4)
    step = trainer().checkpoints.folder / "steps" / "4"
    (step / file_list.NAME).unlink()
    damage(step, "params/d", "cut")
    with pytest.raises(CheckpointError, match="step 4 .* cannot be restored.*there is no other step"):
        trainer().run(progress=False)
    assert step.is_dir()


def test_sigterm_saves_and_the_run_goes_on(trainer, undisturbed, monkeypatch):
    before, t = signal.getsignal(signal.SIGTERM), trainer()
    place, count = stage_task.GroupedBatches.place, []

    def place_and_tell(self, *arguments):
        count.append(1)
        if len(count) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(self, *arguments)

    monkeypatch.setattr(stage_task.GroupedBatches, "place", place_and_tell)
    with pytest.raises(Preempted):
        t.run(progress=False)
    assert t.checkpoints.steps.latest() == 6 and signal.getsignal(signal.SIGTERM) == before
    summary = trainer().run(progress=False)
    assert lines(t) == undisturbed[0] and summary["restarts"] == 1


def board(t: Trainer) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: scalars by tag and step. A record is a length (8 bytes), its checksum (4), so many bytes,
    theirs.
    """
    paths = sorted((t.checkpoints.folder / "metrics").glob("events.out.tfevents.*"))
    content, found = b"".join(path.read_bytes() for path in paths), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
        content = content[16 + length :]
    return found


@pytest.mark.slow
def test_a_profile_and_a_summary(trainer):
    """Of a run that was stopped and went on."""
    for stop_at in (8, None):
        t = trainer(peak_flops=1e9)
        stage = STAGES["pretrain"]
        flops = training_flops(t.model.cfg, stage, program.batch_shape(t.config, stage)).total
        t.run(progress=False, stop_at=stop_at, profile=2)
    assert list((t.checkpoints.folder / "profile").rglob("*.xplane.pb"))
    summary = json.loads((t.checkpoints.folder / "metrics" / "summary.json").read_text())
    assert summary["steps"] == 16 and sum(summary["share"].values()) == pytest.approx(1)
    seconds = summary["seconds"]
    training = seconds["steps"] + seconds["input"]
    assert summary["mfu"] == pytest.approx(16 * flops / (training * 1e9 * 8))
    tokens = sum(line["tokens"] for line in lines(t))
    assert summary["tokens_per_second"] == pytest.approx(tokens / training)
    shown = board(t)
    names = {name.removeprefix("pretrain/") for name in shown} - set(lines(t)[0])
    goodput = {f"goodput_{kind}" for kind in summary["share"]}
    assert names == goodput | {"step_seconds", "input_wait_seconds", "tokens_per_second", "mfu"}
    assert all(set(values) == set(range(1, 17)) for values in shown.values())
    for step in range(1, 17):
        now = {name: shown[f"pretrain/{name}"][step] for name in names}
        assert sum(now[name] for name in goodput) == pytest.approx(1, abs=1e-5)
        assert now["mfu"] == pytest.approx(flops / (now["step_seconds"] * 1e9 * 8), rel=1e-5)
        tokens = shown["pretrain/tokens"][step]
        assert now["tokens_per_second"] == pytest.approx(tokens / now["step_seconds"], rel=1e-5)
        assert 0 <= now["input_wait_seconds"] < now["step_seconds"]
