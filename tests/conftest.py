"""All tests run on eight CPU devices of their own process, in full fp32."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":  # nearly all of the time goes into compiling
    flags = ["--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):  # newer versions do not know this flag, and end the process
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


MOST_MAPS = 20_000  # Linux allows a process 65,530


@pytest.fixture(scope="module", autouse=True)
def forget_what_was_compiled():
    """Thousands of compiled programs in one process exhaust its memory maps, and XLA crashes: a new file starts without
    them.
    """
    yield
    if len(Path("/proc/self/maps").read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Many tests compile the same programs: each is compiled once for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    settings = {"compilation_cache_dir": str(folder / "compiled"), "persistent_cache_min_compile_time_secs": 0}
    for name, value in settings.items():
        os.environ[f"JAX_{name.upper()}"] = str(value)  # for the processes that tests start
        jax.config.update(f"jax_{name}", value)
