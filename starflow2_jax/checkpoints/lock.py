"""lock.json, which names the run that writes into a directory, so that no second one does."""

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
from typing import NoReturn

from starflow2_jax.errors import UserError

RENEWED, EXPIRES = 60, 600  # seconds: between two renewals; without a renewal, until another run may take the lock


class LockedError(UserError):
    """Another run writes into the directory."""


class UncertainLockError(LockedError):
    """A run on another machine wrote into the directory a few minutes ago and may have ended; trying again later can
    help.
    """

    exit_code = 75  # EX_TEMPFAIL


class Lock:
    """The lock of a directory. Only process 0 of a run uses it.

    The file is created with open(..., "x"), which local and network file systems do atomically. On a mounted bucket
    that cannot do so, two runs that start in the same second may both get in; `require_held`, which a run calls before
    each save, then stops the one whose lock was overwritten.
    """

    def __init__(self, folder: Path, name: str = "lock.json"):
        self.folder, self.path = folder, folder / name
        self._id: str | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock during the block. Raises LockedError if another run holds it; then nothing is written."""
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
        """Raises LockedError if another run holds the lock. A lock whose run has ended counts as free."""
        if (owner := self._read()) is not None and not _dead(owner):
            self._refuse(owner)

    def require_held(self) -> None:
        """Raises LockedError if this run's lock was removed, or taken by another run."""
        if self._id is not None and (self._read() or {}).get("id") != self._id:
            raise LockedError(
                f"the lock {self.path} of this run was removed or taken by another run; nothing more is saved, so that "
                f"the other run's steps stay whole"
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
        """Renew the lock until `ended` is set, by setting the file's time, which needs no space on the disk."""
        while not ended.wait(RENEWED):
            with contextlib.suppress(OSError):  # a removed lock is noticed at the next save
                os.utime(self.path)

    def _read(self) -> dict | None:
        """The owner of the lock, and "age", the seconds since its last renewal; None if there is no lock."""
        try:
            age = time.time() - self.path.stat().st_mtime
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:  # the run that writes it is not done, or was killed
            owner = {}
        return {"age": age, **(owner if isinstance(owner, dict) else {})}

    def _refuse(self, owner: dict) -> NoReturn:
        """Raises LockedError about the run that holds the lock."""
        name = f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')}"
        since = f"{name}, started {owner.get('started', 'at an unknown time')},"
        if _here(owner):
            raise LockedError(
                f"{since} writes into {self.folder} already; wait until it has ended, or name another --out"
            )
        raise UncertainLockError(
            f"{since} wrote into {self.folder} {owner['age']:.0f} s ago and may still run; if you have checked that it "
            f"has ended, remove {self.path}, else try again later: the lock expires after {EXPIRES} s without renewal"
        )


def _dead(owner: dict) -> bool:
    """Whether the run that holds a lock has certainly ended, or has not renewed the lock for EXPIRES seconds."""
    if _here(owner):
        process = owner.get("process")
        return not isinstance(process, int) or _place(process).get("born") != owner.get("born") or not _alive(process)
    rebooted = owner.get("host") == socket.gethostname() and owner.get("boot") != _place(os.getpid()).get("boot")
    return rebooted or owner["age"] > EXPIRES


def _here(owner: dict) -> bool:
    """Whether the owner's process number is one of ours: same host, same boot, same namespace of processes."""
    own = _place(os.getpid())
    same = all(owner.get(name) == own.get(name) for name in ("boot", "namespace"))
    return owner.get("host") == socket.gethostname() and same


def _place(process: int) -> dict[str, str]:
    """What distinguishes a process from others with the same number: "boot", the machine's boot; "namespace", of
    process numbers; "born", the start of the process, missing if it has ended. Empty on systems other than Linux."""
    found = {}
    with contextlib.suppress(OSError, IndexError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        state, *rest = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if state not in "ZX":  # zombies: they have ended, but their parent has not asked for the exit code
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
