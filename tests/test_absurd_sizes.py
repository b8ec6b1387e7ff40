"""Sizes that no machine has room for are refused in one sentence, before a run makes anything; none of them hangs.

The cases are made from the schema, so a new size is covered from the day that it is added.
"""

from operator import attrgetter
from pathlib import Path

import jax
import pytest
from refused import refused
from tiny_experiment import tiny_config

from starflow2_jax.config import loading as configs
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import COMPUTED, Key
from starflow2_jax.parallel import devices
from starflow2_jax.training.loop import Trainer

ABSURD = 10**9
NO_SIZES = (*COMPUTED, "window", "steps", "warmup")  # keys that take no memory of their own, however large


def sizes() -> list[Key]:
    """The keys of the networks and of a stage's batch that hold a whole number, or several."""
    keys = configs.described(configs.complete(tiny_config()))
    found = [key for key in keys if key.path.startswith(("model.", "stages.pretrain."))]
    whole = [
        key
        for key in found
        if type(key.value) is int or isinstance(key.value, tuple) and {*map(type, key.value)} == {int}
    ]
    return [key for key in whole if key.path.split(".")[-1] not in NO_SIZES]


@pytest.mark.parametrize("key", sizes(), ids=lambda key: key.path)
def test_an_absurd_size(key, tmp_path):
    config = tiny_config()
    group, _, name = key.path.rpartition(".")
    absurd = (ABSURD,) * len(key.value) if isinstance(key.value, tuple) else ABSURD
    attrgetter(group)(config)[name] = absurd
    refused(ConfigError, lambda: Trainer(config, tmp_path / "run").run(progress=False), saying=())
    assert not (tmp_path / "run").exists()


def test_a_part_that_does_not_fit_the_memory(tmp_path):
    config = tiny_config()
    config.model.deep.mlp_hidden = ABSURD
    saying = ("stage pretrain", "GB on each device, which has", "mesh.fsdp")
    refused(ConfigError, lambda: Trainer(config, tmp_path / "run").run(progress=False), saying=saying)
    assert not (tmp_path / "run").exists()


def test_the_memory_of_a_device(monkeypatch):
    """CPU devices share the machine's memory; other devices tell what a program can use, or nothing."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    assert devices.memory(jax.devices()[0]) * jax.local_device_count() == 1024 * int(line.split()[1])

    class Accelerator:
        platform, stats = "tpu", {"bytes_limit": 16e9}

        def memory_stats(self):
            return self.stats

    device = Accelerator()
    assert devices.memory(device) == 16e9
    device.stats = None
    assert devices.memory(device) is None
