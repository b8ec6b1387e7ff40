"""One writer per directory: lock.json names the run that writes there."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from starflow2_jax.errors import UserError

RENEWED, EXPIRES = 60, 600  # seconds: between two renewals of a lock; without one, until another run may take it


class LockedError(UserError):
    """Another run writes into the directory."""


class UncertainLockError(LockedError):
    """A run on a machine that cannot be asked wrote into the directory a few minutes ago; trying again later can help."""

    exit_code = 75  # EX_TEMPFAIL


class Lock:
    """The lock of a directory. Only process 0 of a run uses it.

    The file is created with open(..., "x"), which local and network file systems do atomically. On a mounted bucket that
    cannot do so, two runs that start in the same second may both get in; `require_held`, which a run calls before each
    save, then stops the one whose lock was overwritten.
    """

    def __init__(self, folder: Path, name: str = "lock.json"):
        self.folder, self.path = folder, folder / name
        self._id: str | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock during the block. Raises LockedError, before anything is written, if another run holds it."""
        self.require_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._id = uuid.uuid4().hex
        self._create()
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(ended,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            if (self._read() or {}).get("id") == self._id:
                self.path.unlink(missing_ok=True)
            self._id = None

    def require_free(self) -> None:
        """Raises LockedError if another run holds the lock. A lock whose run is dead counts as free."""
        if (owner := self._read()) is not None and not _dead(owner):
            self._refuse(owner)

    def require_held(self) -> None:
        """Raises LockedError if the lock, which this run holds, was removed or taken over."""
        if self._id is not None and (self._read() or {}).get("id") != self._id:
            raise LockedError(
                f"the lock {self.path} of this run was removed or taken by another run; nothing more is saved, so that the "
                "other run's steps stay whole"
            )

    def _create(self) -> None:
        owner = {
            "id": self._id,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": time.strftime("%F %T %z"),
        }
        try:
            file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            self.require_free()  # raises if another run took it just now
            print(f"WARNING: {self.path} was left by a run that has ended; it is replaced", file=sys.stderr)
            self.path.unlink(missing_ok=True)
            file = self.path.open("x", encoding="utf-8")
        try:
            with file:
                json.dump(owner | _place(os.getpid()), file, indent=1)
        except BaseException:  # such as a full disk
            self.path.unlink(missing_ok=True)
            raise

    def _renew(self, ended: threading.Event) -> None:
        """Set the file's time now and then; it needs no space on the disk."""
        while not ended.wait(RENEWED):
            with contextlib.suppress(OSError):  # a removed lock is noticed at the next save
                os.utime(self.path)

    def _read(self) -> dict | None:
        """The owner and "age", the seconds since the last renewal; None where there is no lock."""
        try:
            age = time.time() - self.path.stat().st_mtime
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:  # its run was killed, or is just now writing it
            owner = {}
        return {"age": age, **(owner if isinstance(owner, dict) else {})}

    def _refuse(self, owner: dict) -> None:
        name = f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')}"
        since = f"{name}, started {owner.get('started', 'at an unknown time')},"
        if _here(owner):
            raise LockedError(
                f"{since} writes into {self.folder} already; wait until it has ended, or name another --out"
            )
        raise UncertainLockError(
            f"{since} wrote into {self.folder} {owner['age']:.0f} s ago and may still run; if you have checked that it has "
            f"ended, remove {self.path}, else try again: the lock expires after {EXPIRES} s without a sign of life"
        )


def _dead(owner: dict) -> bool:
    """Whether the run that holds a lock has ended for certain, or showed no sign of life for EXPIRES seconds."""
    if _here(owner):
        process = owner.get("process")
        return not isinstance(process, int) or _place(process).get("born") != owner.get("born") or not _alive(process)
    rebooted = owner.get("host") == socket.gethostname() and owner.get("boot") != _place(os.getpid()).get("boot")
    return rebooted or owner["age"] > EXPIRES


def _here(owner: dict) -> bool:
    """Whether the owner's process number means something here: same host, same boot, same namespace of processes."""
    own = _place(os.getpid())
    same = all(owner.get(name) == own.get(name) for name in ("boot", "namespace"))
    return owner.get("host") == socket.gethostname() and same


def _place(process: int) -> dict[str, str]:
    """What tells a process from others with the same number: the machine's boot, the namespace of processes, and when
    the process was born (Linux; elsewhere empty)."""
    found = {}
    with contextlib.suppress(OSError, IndexError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        state, *rest = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if state not in "ZX":  # these have ended; their parent has not asked for the exit code yet
            found["born"] = rest[18]
    return found


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return True
