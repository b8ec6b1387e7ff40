"""Real plans of a shrunk experiment on four described TPUs, made by the command in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENT = f"""
from starflow2_jax.config import loading as configs

def get_config(runlocal=False):
    c = configs.load({str(ROOT / "starflow2_jax/experiments" / "starflow2_7b_joint.py")!r}, runlocal=True).unlock()
    c.stages.joint.optimizer.offload = True
    return c
"""

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

pytestmark = pytest.mark.tpu


def planned(folder: Path, *arguments: str) -> tuple[list[dict], str]:
    """The file that `starflow2 plan` writes for v5e:2x2, and its output."""
    (folder / "experiment.py").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "starflow2_jax.cli", "plan", "--config", str(folder / "experiment.py")]
    command += ["--topology", "v5e:2x2", "--json", str(folder / "plan.json"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "plan.json").read_text()), done.stdout


def test_a_step_whose_optimizer_lies_in_the_hosts_memory(tmp_path):
    """With a policy that may skip an update, as in all 7B experiments."""
    [made], said = planned(tmp_path)
    assert made["fits"] and made["mesh"]["fsdp"] == 4 and not made["unknown_loops"]
    assert made["flops_compiled"] == pytest.approx(made["hardware_by_hand"], rel=0.05)
    assert made["arguments"]["optimizer"] == 0
    assert made["host"] == pytest.approx(2 * made["arguments"]["trained"], rel=0.01)  # two moments
    assert sum(made["arguments"].values()) < made["peak"] < made["memory"]
    assert made["seconds"] > 0 and made["collectives"] and "in the host memory" in said


def test_gradients_are_summed_between_slices(tmp_path):
    """Two slices of four chips: each chip sends its part of the gradients to the other slice, once."""
    [made], _ = planned(tmp_path, "--topology", "v5e:2x2:2", "--config.stages.joint.optimizer.offload=False")
    assert made["mesh"] == dict(data=2, fsdp=4, sequence=1, tensor=1) and made["chips"] == 8
    between = [c for c in made["collectives"] if c["axis"] == "slices"]
    assert {c["kind"] for c in between} == {"all-reduce"}
    assert sum(c["bytes"] for c in between) == pytest.approx(made["arguments"]["trained"], rel=0.1)


def test_the_samplers_steps(tmp_path):
    """If a head of keys has one query, as in the deep flow of `write`, attention is no matrix product on a TPU."""
    (read, write), said = planned(tmp_path, "--sampler", "--capacity", "128", "--rows", "64")
    assert [plan["what"].split(":")[0] for plan in (read, write)] == ["sampler, read", "sampler, write"]
    assert read["flops_compiled"] == pytest.approx(read["hardware_by_hand"], rel=0.05)
    products = write["hardware_by_hand"] - 2 * write["flops_by_hand"]["deep flow attention"]  # its caches are half full
    assert write["flops_compiled"] == pytest.approx(products, rel=0.05)
    for plan in (read, write):
        assert plan["seconds_a_token"] > 0 and plan["mfu"] > 0
    assert said.count("s a token of a row") == 2


def test_a_search(tmp_path):
    arguments = (
        "--search",
        "--rows-per-chip",
        "2",
        "--tensor",
        "1,3",
        "--data",
        "2",
        "--sequence",
        "2",
        "--remat",
        "full",
    )
    ranked, said = planned(tmp_path, *arguments)
    assert [c["choice"] for c in ranked] == ["rows=8 data=2 sequence=2 remat=full", "data=2 sequence=2 tensor=3"]
    assert ranked[0]["plan"]["fits"] and ranked[0]["plan"]["mesh"] == dict(data=2, fsdp=1, sequence=2, tensor=1)
    assert ranked[1]["failure"] == "does not divide 4 chips" and "does not divide 4 chips" in said


GRADIENTS = """
import json
import jax
import jax.numpy as jnp
from starflow2_jax.models.layers import Transformer, TransformerConfig
from starflow2_jax.parallel import hardware, sharding
from starflow2_jax.planning import compiling
from starflow2_jax.planning.costs import Analysis
from starflow2_jax.planning.hlo import Module

B, S, E = 64, 128, 256
topology = hardware.parse_topology("v5p:4x4x4")
devices = compiling.described_devices(topology)
mesh = sharding.make_mesh(data=-1, fsdp=-1, devices=devices)
stack = Transformer(TransformerConfig(layers=2, width=E, heads=2, mlp_hidden=4 * E, dtype="bfloat16", remat="full"))
with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((B, S, E), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    params = jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.zeros((1, S, E)), None)["params"])
    params = sharding.abstract(params, mesh)
    loss = lambda params, x: jnp.sum(stack.apply({"params": params}, x, None)[0].astype(jnp.float32))
    gradient = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda p: p.sharding, params))
    compiled = compiling.compile_for(devices, gradient, params, x)
places = topology.places(list(mesh.devices.flat))
costs = Analysis(Module(compiled.as_text()), topology, dict(mesh.shape), places).costs
print(json.dumps({f"{kind} over {axis}": c.bytes for (kind, axis), c in costs.collectives.items()}))
"""


def test_gradients_are_reduce_scattered_and_weights_gathered():
    """In bfloat16, on the mesh that data and fsdp share, and over fsdp; over data, the shards are summed.

    With all 64 chips on fsdp, libtpu makes all-reduces of everything.
    """
    command = [sys.executable, "-c", GRADIENTS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    sent = json.loads(done.stdout.splitlines()[-1])
    matrices = 2 * 2 * (4 * 256 * 256 + 2 * 256 * 1024)  # bytes
    assert sent.pop("reduce-scatter over fsdp") == matrices * 15 / 16
    assert sent.pop("all-gather over fsdp") >= 2 * matrices * 15 / 16  # forward and backward
    assert sent.pop("all-reduce over data") == 2 * 3 / 4 * matrices / 16
    assert sum(sent.values()) < 0.01 * matrices  # of norms
