"""A disk that is full or read-only: one sentence, the last good checkpoint stays, and the run resumes when there is
room.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import lines, with_stand_ins

from starflow2_jax import cli
from starflow2_jax.checkpoints import atomic_folder
from starflow2_jax.checkpoints.atomic_folder import write_whole
from starflow2_jax.errors import StorageError, UserError, refused_write, storage_errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    return lambda folder="run": with_stand_ins(monkeypatch, tmp_path / folder)


def full(monkeypatch, after: int) -> None:
    """A disk that has no free space any more once `after` checks were passed."""
    asked = []

    def usage(folder):
        asked.append(folder)
        return (10**12, 0, 10**12) if len(asked) <= after else (10**12, 10**12, 5)

    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", usage)


@pytest.mark.slow
def test_a_run_resumes_from_the_last_good_checkpoint_when_there_is_room_again(trainer, monkeypatch):
    with monkeypatch.context() as patched:
        full(patched, after=2)
        with pytest.raises(StorageError, match=r"free space.*last good checkpoint is step 8\); make room.*again$"):
            trainer().run(progress=False)
    t = trainer()
    assert t.checkpoints.steps.latest() == 8 and not (t.checkpoints.folder / "lock.json").exists()
    t.run(progress=False)
    assert t.checkpoints.steps.latest() == 16 and len(lines(t)) == 16
    undisturbed = trainer("undisturbed")
    undisturbed.run(progress=False)
    assert lines(t) == lines(undisturbed)


def test_a_write_that_fails_in_the_background_is_reported_in_one_sentence(trainer, monkeypatch):
    """As orbax raises it when the next step is saved, in tensorstore's words."""
    t = trainer()
    manager = t.checkpoints.steps.manager
    wait = manager.wait_until_finished

    def failing():
        wait()
        if manager.latest_step() == 8:
            raise ValueError(
                "RESOURCE_EXHAUSTED: Failed writing: \"d/1\": No space left on device [os_error_code='28']"
            )

    monkeypatch.setattr(manager, "wait_until_finished", failing)
    with pytest.raises(StorageError, match=r"run cannot be written: No space left on device \(.*step 8\); make room"):
        t.run(progress=False)


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
def test_metrics_that_cannot_be_written_end_the_run(trainer, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    t = trainer()
    monkeypatch.setattr("starflow2_jax.training.metrics.Metrics.write", refuse)
    with pytest.raises(StorageError, match=os.strerror(number)) as refused:
        t.run(progress=False)
    assert str(t.checkpoints.folder) in str(refused.value) and "\n" not in str(refused.value)


def test_event_files_on_a_full_disk_end_the_run(trainer, monkeypatch):
    """The system refuses the write itself: /dev/full is a disk that is always full."""
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: Path("/dev/full").open("wb"))
    with pytest.raises(StorageError, match=r"run cannot be written: No space left on device.*make room"):
        trainer().run(progress=False)


def test_a_file_stays_as_it_was_where_a_write_fails(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_whole(path, "old")

    def refuse(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match="config.json.*No space left"), storage_errors(tmp_path):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error, cause",
    (
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), None),
        (FileNotFoundError(errno.ENOENT, "No space left on device"), None),
    ),
)
def test_only_refused_writes_count(error, cause):
    assert refused_write(error) == cause
    outer = RuntimeError("outside")
    outer.__cause__ = error
    assert refused_write(outer) == cause


def test_the_first_error_is_the_one_that_is_told(tmp_path):
    """Closing files on a full disk fails, too."""
    with pytest.raises(StorageError, match="^first"), storage_errors(tmp_path):
        try:
            raise StorageError("first")
        finally:
            raise OSError(errno.ENOSPC, "second")


def test_the_command_line_exits_with_the_documented_code(monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/media/cd/run")

    monkeypatch.setattr("starflow2_jax.config.loading.load", refuse)
    assert cli.main(["train", "--config", "digits_quick"]) == StorageError.exit_code == 74
    assert capsys.readouterr().err == (
        "starflow2: /media/cd/run cannot be written: Read-only file system; make room there, and start the same "
        "command again\n"
    )
    assert "74 " in cli.EXIT_CODES and issubclass(StorageError, UserError)


SMALL_DISK = """
mount -t tmpfs -o size=3m tmpfs "$1" && cd "$1" || exit 99
"$2" -m starflow2_jax.cli train --config "$3" --out run; echo "exit $?"
ls run/lock.json run/steps; mount -o remount,ro tmpfs "$1"
"$2" -m starflow2_jax.cli train --config "$3" --out run; echo "exit $?"
mount -o remount,rw,size=99m tmpfs "$1"
"$2" -m starflow2_jax.cli train --config "$3" --out run; echo "exit $?"
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare to mount a small disk")
def test_a_small_disk(tmp_path):
    """Full, then read-only, then large enough: two refusals, and the third start trains."""
    experiment = tmp_path / "small.py"
    experiment.write_text(
        "from tiny_experiment import drill_config\n\n\ndef get_config(runlocal=False):\n"
        "    c = drill_config()\n    c.stages.pretrain.steps = 4\n    c.model.vlm.mlp_hidden = 4096\n    return c\n"
    )
    (tmp_path / "disk").mkdir()
    arguments = [str(tmp_path / "disk"), sys.executable, str(experiment)]
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = ["unshare", "-Urm", "bash", "-c", SMALL_DISK, "bash", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare" in done.stderr[:20]:
        pytest.skip("this machine lets nobody mount a disk of their own")
    said = [line for line in done.stderr.splitlines() if line.startswith("starflow2:")]
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 74", "exit 74", "exit 0"]
    assert len(said) == 2 and "free space" in said[0] and "Read-only file system" in said[1], done.stderr
    assert "Traceback" not in done.stderr
