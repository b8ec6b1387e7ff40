"""Plans of small programs for CPU devices in a TPU's place; topologies; the command."""

import json
import sys
from pathlib import Path

import jax
import pytest

from starflow2_jax import cli
from starflow2_jax.config import loading as configs
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import hardware
from starflow2_jax.parallel.sharding import AXES
from starflow2_jax.planning import compiling, plan, report, search
from starflow2_jax.training import program
from starflow2_jax.training.program import batch_shape, find_stage

EXPERIMENT = Path(__file__).parents[2] / "starflow2_jax/experiments" / "starflow2_7b_t2i.py"
TOPOLOGY = hardware.Topology(hardware.CHIPS["v5e"], (2, 4))
XLA_SAYS = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 33.60G of 15.75G hbm.

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(step)/deep/dot_general" source_file="layers.py" source_line=7
     Shape: f32[16,24,2048,2048]{3,2,1,0:T(8,128)}
     Unpadded size: 8.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[16,2048,8192]{2,1,0:T(8,128)(2,1)}
     Allocation type: HLO temp
"""


@pytest.fixture(scope="module")
def small():
    return configs.load(EXPERIMENT, ["mesh.fsdp=8"], runlocal=True)


def test_plan_of_a_step(small):
    stage = find_stage(small, "1")
    made = plan.plan_step(small, stage, TOPOLOGY, jax.devices()[:8])
    assert made.fits and made.mesh["fsdp"] == 8 and not made.unknown_loops
    assert made.flops_compiled == pytest.approx(made.hardware_by_hand, rel=0.05)
    assert made.arguments["average"] == made.arguments["trained"]
    assert made.arguments["optimizer"] == pytest.approx(2 * made.arguments["trained"], rel=0.01)  # two moments
    assert sum(made.arguments.values()) < made.peak < made.memory
    assert {c["axis"] for c in made.collectives} == {"fsdp"}
    shape = batch_shape(small, stage)
    assert made.tokens_per_second == pytest.approx(shape.rows * shape.length / made.seconds)
    assert made.mfu == pytest.approx(sum(made.flops_by_hand.values()) / made.seconds / TOPOLOGY.chip.flops)
    assert json.loads(json.dumps(made.json()))["chips"] == 8
    assert "fits" in report.text(made) and f"MFU {made.mfu:.1%}" in report.text(made)


def test_a_plan_says_which_parameters_no_chip_shares(small, monkeypatch):
    """Seven chips, and no size of the shrunk model is a multiple of seven."""
    monkeypatch.setattr(program.sharding, "LEAST", 1)
    mesh = jax.sharding.AbstractMesh((1, 7, 1, 1), AXES)
    whole = program.held_whole(small, Pretzel(configs.pretzel(small)), mesh)
    assert "fsdp=7 divides no dimension of vlm/" in whole
    made = plan.Plan("", "", 7, dict(fsdp=7), {}, True, 1, 2 * 2**30, {}, whole=whole)
    assert whole in report.text(made)


def test_plans_of_the_sampler(small):
    """Two programs; a turn of `write` is counted once, and both hold the same parameters and caches."""
    stage = find_stage(small, "joint")
    read, write = plan.plan_sampler(small, stage, TOPOLOGY, jax.devices()[:8], rows=8, capacity=64)
    assert read.arguments == write.arguments and read.fits and write.fits
    for made in (read, write):
        assert made.flops_compiled == pytest.approx(made.hardware_by_hand, rel=0.05)
        assert 0 < sum(made.flops_by_hand.values()) < made.hardware_by_hand and made.mfu > 0
    assert write.seconds_a_token == write.seconds and read.seconds_a_token == read.seconds / 32
    assert "s a token of a row" in report.text(write) and "half full" in report.text(write)
    layers = small.model.vlm.layers * small.model.vlm.kv_heads * small.model.vlm.head_dim
    layers += small.model.deep.layers * small.model.deep.width
    lengths = 2 * 2 * 4  # of each stream's two lanes
    assert (
        read.arguments["caches"] == 2 * 2 * 2 * layers * 64 + lengths
    )  # two lanes, keys and values, bfloat16, one row a chip
    assert write.unknown_loops == 1 and read.unknown_loops == 0
    assert 0 < write.seconds < read.seconds
    assert "one position a row" in report.text(write)


def test_search_survives_what_does_not_compile(small):
    stage = find_stage(small, "text_to_image")
    choices = list(search.candidates(8, [1, 2], [1], ["full"])) + [search.Candidate(8, dict(fsdp=3), "full")]

    def make(config):
        if config.mesh.fsdp == 3:
            raise ConfigError("mesh fsdp=3 does not fit 8 devices")
        rows = config.stages.text_to_image.rows
        fits = rows < 16
        return plan.Plan("", "", 8, {}, {}, fits, 1, 2 * 2**30, {}, tokens_per_second=rows, mfu=0.5)

    said = []
    ranked = search.search(small, stage, choices, make, said.append)
    assert [c.rows for c in ranked[:1]] == [8] and not ranked[0].failure
    assert {c.failure.split(":")[0] for c in ranked[1:]} == {"does not fit", "does not compile"}
    assert len(said) == 3 and "fsdp=3 does not fit 8 devices" in search.table(ranked)
    assert small.stages.text_to_image.rows == 8  # the config is not touched


def test_search_over_all_axes():
    """Choices that do not divide the chips are listed with that reason."""
    found = list(search.candidates(8, [1, 2], [1, 3], ["full", "dots"], sequences=[2], datas=[1, 2, 16]))
    meshes = {
        tuple(c.mesh.get(axis) for axis in ("data", "fsdp", "sequence", "tensor")) for c in found if not c.failure
    }
    assert meshes == {(1, 4, 2, 1), (2, 2, 2, 1)}
    assert len(found) == 2 * 2 * 2 + 4 and {c.rows for c in found} == {0, 8, 16}
    failures = [c for c in found if c.failure]
    assert [c.names() for c in failures][:2] == ["sequence=2 tensor=3", "data=2 sequence=2 tensor=3"]
    assert {c.failure for c in failures} == {"does not divide 8 chips"}


def test_out_of_memory_without_numbers():
    error = compiling.out_of_memory("RESOURCE_EXHAUSTED: XLA says nothing else")
    full = plan.Plan("", "", 8, {}, {}, False, 16 * 2**30, error.needed, {})
    assert "does not fit: XLA does not tell how much more than 16.00 GiB" in report.text(full)


def test_out_of_memory_says_what_to_change(small):
    error = compiling.out_of_memory(XLA_SAYS)
    assert error.needed == 33.6 * 2**30
    assert error.largest == [
        (8 * 2**30, "f32[16,24,2048,2048]{3,2,1,0:T(8,128)} jit(step)/deep/dot_general"),
        (512 * 2**20, "bf16[16,2048,8192]{2,1,0:T(8,128)(2,1)}"),
    ]
    stage = find_stage(small, "1")
    full = plan.Plan("", "", 8, {}, {}, False, 16 * 2**30, error.needed, {}, largest=error.largest)
    full.advice = plan.advice(full, small, stage)
    said = report.text(full)
    assert "does not fit: 33.60 GiB of 16.00 GiB" in said and "deep/dot_general" in said and "accumulate=2" in said
    for change in (
        "mesh.fsdp",
        "optimizer.moments",
        "optimizer.offload",
        "mesh.tensor",
        "mesh.sequence",
        "splash on TPUs",
    ):
        assert change in said


@pytest.mark.parametrize(
    "text, chips_", [("v5p:4x4x4", 64), ("v5e:16x16", 256), ("v6e:16x16:4", 1024), ("v4:4x4x8", 128)]
)
def test_topologies(text, chips_):
    assert str(hardware.parse_topology(text)) == text and hardware.parse_topology(text).chips == chips_


@pytest.mark.parametrize(
    "text, shape",
    [
        ("h200:1", (1, 1)),
        ("h100:8", (1, 8)),
        ("a100-80:8x4", (8, 4)),
        ("b200:8x8", (8, 8)),
        ("gb200:72", (1, 72)),
        ("rtx4090:1", (1, 1)),
    ],
)
def test_nodes_of_gpus(text, shape):
    topology = hardware.parse_topology(text)
    assert str(topology) == text and topology.shape == shape
    assert topology.chip.memory == 0.95 * topology.chip.installed


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("v5p:128", "v5p:4x4x8"),
        ("v5p:8x8", "v5p:4x4x4"),
        ("v5e:4x4x4", "v5e:8x8"),
        ("v6e:32x32", "v6e:16x16"),
        ("v6:16x16", "v6e:16x16"),
        ("v5e", "v5e:8x8"),
        ("v5p:3x4x4", "v5p:4x4x4"),
        ("h100:64", "h100:8x8"),
        ("h100:16x16", "h100:32x8"),
        ("h100", "h100:8x8"),
        ("a100:8", "a100-40:8"),
        ("h300:8", "h100:8"),
    ],
)
def test_wrong_topologies_name_the_nearest(text, nearest):
    with pytest.raises(UserError, match=nearest + r"\b"):
        hardware.parse_topology(text)


def test_slices_that_cannot_be_planned():
    for count in ("0", "x", "1000"):
        with pytest.raises(UserError, match="must end with the number of slices, from 1 to 999, as in v6e:4x4:4"):
            hardware.parse_topology(f"v6e:4x4:{count}")
    with pytest.raises(UserError, match="between slices of v4 is not known; plan for v4:4x4x8"):
        hardware.parse_topology("v4:4x4x8:2")


@pytest.mark.parametrize("topology, extra", [("v5p:4x4x4", "tpu"), ("h100:8", "cuda")])
def test_without_the_compiler_it_says_so(monkeypatch, capsys, topology, extra):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--config", str(EXPERIMENT), "--topology", topology]) == 2
    assert f"pip install 'starflow2_jax[{extra}]'" in capsys.readouterr().err
