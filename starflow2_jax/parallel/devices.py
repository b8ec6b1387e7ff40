"""Starts JAX's devices. If they do not start, the error is one sentence that says what to do."""

import os
import re
from pathlib import Path
from typing import Any

import jax

from starflow2_jax.errors import UserError

# JAX's name of a platform -> what users call its devices, and the extra of this package that supports it.
EXTRAS = {"cuda": ("GPU", "cuda"), "gpu": ("GPU", "cuda"), "tpu": ("TPU", "tpu")}
DEVICE_FILES = {"GPU": re.compile(r"/dev/nvidia\d+"), "TPU": re.compile(r"/dev/(accel|vfio/)\d+")}
IN_USE = re.compile(r"already in use|is in use|resource busy|lockfile|CUDA_ERROR_DEVICE_UNAVAILABLE", re.IGNORECASE)


def start() -> list[Any]:
    """All JAX devices of all processes. Raises UserError if JAX cannot start them."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(explanation(str(error), os.environ.get("JAX_PLATFORMS", ""))) from None


def free_memory(device: Any) -> float:
    """Bytes that are free in the memory of a device; of a CPU device, in the machine's. Infinite if this is not
    known.
    """
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text(encoding="utf-8")) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else float("inf")


def memory(device: Any) -> float | None:
    """Bytes of memory that programs can use on a device; None where JAX does not tell. The CPU devices of a process
    share the machine's memory alike."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def explanation(error: str, platforms: str) -> str:
    """What JAX's error means and what to do, in one sentence. `platforms`: the value of $JAX_PLATFORMS."""
    reason = " ".join(re.sub(r"\((set|you may need).*?\)$", "", error.strip(), flags=re.DOTALL).split())[:300]
    named = next((name for name in platforms.split(",") if name in EXTRAS), None)
    if IN_USE.search(error):
        device = EXTRAS[named][0] if named else "GPU" if "CUDA" in error else "TPU"
        pid = re.search(r"\bpid:? *(\d+)", error)
        others = [f"{pid[1]} ({_program(int(pid[1]))})"] if pid else holders(device)
        whose = f"process {', '.join(others)}" if others else "another process"
        return (
            f"the {device} is in use by {whose}; end that process, or set JAX_PLATFORMS=cpu to run without the {device}"
        )
    if named:
        device, extra = EXTRAS[named]
        cause = f" ({reason})" if reason else ""
        return (
            f"JAX_PLATFORMS={platforms} asks for a {device}, but JAX finds none{cause}; check that this machine has "
            f"one, install its support with pip install 'starflow2_jax[{extra}]', or unset JAX_PLATFORMS"
        )
    if platforms:
        advice = "set it to cpu, cuda or tpu, or unset it"
        return f"JAX_PLATFORMS={platforms} does not work on this machine ({reason}); {advice}"
    return f"JAX cannot start the devices of this machine ({reason}); set JAX_PLATFORMS=cpu to run without them"


def holders(device: str) -> list[str]:
    """Other processes that have the machine's GPUs or TPUs open, as "1234 (python)". Only those that /proc shows are
    known.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if pid != os.getpid() and _opens(folder / "fd", DEVICE_FILES[device]):
            found.append(f"{pid} ({_program(pid)})")
    return found


def _opens(folder: Path, wanted: re.Pattern) -> bool:
    try:
        return any(wanted.fullmatch(os.readlink(link)) for link in folder.iterdir())
    except OSError:  # another user's process, or one that has just ended
        return False


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return "name unknown"
