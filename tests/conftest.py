"""All tests run on eight CPU devices of their own process, in full fp32."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":  # nearly all of the time goes into compiling
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def forget_what_was_compiled():
    """Thousands of compiled programs in one process exhaust its memory maps, and XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Trainers of one config compile the same programs: this file compiles each once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.2), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
