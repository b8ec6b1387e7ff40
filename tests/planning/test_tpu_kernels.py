"""Every stage's training step with splash attention and the sampler's steps, compiled for described TPUs of each kind
in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
import re
import sys
from small_streams import REMAT, S, small
from starflow2_jax.config import loading as configs
from starflow2_jax.models.flops import training_flops
from starflow2_jax.parallel import hardware
from starflow2_jax.planning import compiling
from starflow2_jax.planning.costs import Analysis
from starflow2_jax.planning.hlo import Module
from starflow2_jax.stages import STAGES
from starflow2_jax.training.program import batch_shape

topology = hardware.parse_topology(sys.argv[1])
devices = compiling.described_devices(topology)
streams = dict.fromkeys(("vlm", "deep", "shallow"), ("splash", 128))
for name, remat in REMAT.items():
    config, stage = small(streams, remat, grid=(8, 16)), STAGES[name]
    program = compiling.compile_step(config, stage, devices)
    text = program.compiled.as_text()
    costs = Analysis(Module(text), topology, dict(program.mesh.shape), topology.places(list(program.mesh.devices.flat))).costs
    found = dict(
        kernels=sorted(set(re.findall(r"splash_m[hq]a_(fwd|dq|dkv)", text))),
        square=[d for d in re.findall(r"\\b(?:bf16|f32|pred)\\[([0-9,]*)\\]", text) if d.endswith(f",{S},{S}")],
        compiled=costs.flops,
        by_hand=training_flops(configs.pretzel(config), stage, batch_shape(config, stage)).executed / topology.chips,
    )
    print(json.dumps(found))
print(json.dumps(sorted(compiling.compile_sampler(small(streams, grid=(8, 16)), STAGES["joint"], devices, 4, 128))))
"""


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_every_stage_with_splash_attention(topology):
    """The step calls the kernel forward and backward, holds no array of S x S, and computes what the formula counts."""
    environment = os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS="", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    command = [sys.executable, "-c", PROGRAM, topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    *stages, sampler = map(json.loads, done.stdout.splitlines())
    assert len(stages) == 3 and sampler == ["read", "write"]
    for step in stages:
        assert step["kernels"] == ["dkv", "dq", "fwd"] and step["square"] == []
        assert step["compiled"] == pytest.approx(step["by_hand"], rel=0.05)
