"""Training steps and the sampler's steps, compiled for NVIDIA GPUs that are described, not present.

XLA and Triton compile whole programs, with scans, remat and the mesh. cuDNN plans its calls on a GPU, so what it
refuses shows itself only there.
"""

import re

import jax
import pytest
from small_streams import REMAT, S, small

from starflow2_jax.config import loading as configs
from starflow2_jax.errors import UserError
from starflow2_jax.models.flops import training_flops
from starflow2_jax.parallel import hardware
from starflow2_jax.planning import compiling, plan
from starflow2_jax.planning.costs import Analysis
from starflow2_jax.planning.hlo import Module
from starflow2_jax.stages import CODEC_STAGES, STAGES
from starflow2_jax.training.program import batch_shape

pytestmark = pytest.mark.gpu_compile

# GPU -> kernel and channels per head of each stream. Together: every kernel that the capability has, 64 to 256
# channels.
STREAMS = {
    "a100-80": dict(vlm=("triton", 256), deep=("triton", 64), shallow=("cudnn", 128)),
    "h100": dict(vlm=("cudnn_packed", 128), deep=("triton", 64), shallow=("cudnn", 256)),
    "b200": dict(vlm=("triton", 128), deep=("cudnn_packed", 64), shallow=("cudnn", 128)),
}
CALLS = {"triton": "__gpu\\$xla.gpu.triton", "cudnn": "__cudnn\\$fmhaSoftmax", "cudnn_packed": "__cudnn\\$fmhaSoftmax"}


@pytest.fixture(autouse=True)
def as_in_a_run():
    """The tests' own settings would change the compiled products."""
    with jax.default_matmul_precision(None):
        yield


def described(gpu: str, count: int = 4) -> list:
    return compiling.described_devices(hardware.parse_topology(f"{gpu}:{count}"))


@pytest.mark.parametrize("stage", REMAT)
@pytest.mark.parametrize("gpu", STREAMS)
def test_every_stage_with_every_kernel(gpu, stage):
    """The program calls the kernels, holds no array of S x S, and computes what the formula counts."""
    config, row = small(STREAMS[gpu], REMAT[stage]), STAGES[stage]
    topology = hardware.parse_topology(f"{gpu}:2x2")
    program = compiling.compile_step(config, row, compiling.described_devices(topology))
    text = program.compiled.as_text()
    streams = {"vlm", "deep", "shallow"} if stage != "image_to_text" else {"vlm"}
    for name in streams:
        kernel = STREAMS[gpu][name][0]
        assert re.search(CALLS[kernel], text), f"{name}: no call of {kernel}"
    for dims in re.findall(r"\b(?:bf16|f32|pred)\[([\d,]+)\]", text):
        assert not dims.endswith(f",{S},{S}"), f"an array of S x S: {dims}"
    places = topology.places(list(program.mesh.devices.flat))
    costs = Analysis(Module(text), topology, dict(program.mesh.shape), places).costs
    counted = training_flops(configs.pretzel(config), row, batch_shape(config, row)).executed / topology.chips
    assert costs.flops == pytest.approx(counted, rel=0.05) and not costs.unknown
    assert {axis for _, axis in costs.collectives} <= {"fsdp", "tensor", "fsdp+tensor"}


def test_rows_that_are_cut():
    """A sequence axis: cuDNN with a bias is the kernel for it, and the others refuse it."""
    streams = dict(vlm=("cudnn", 128), deep=("cudnn", 64), shallow=("cudnn", 128))
    program = compiling.compile_step(small(streams, mesh="sequence"), STAGES["joint"], described("a100-80"))
    assert "__cudnn$fmhaScaleBiasSoftmax" in program.compiled.as_text()
    with pytest.raises(UserError, match="'triton' takes whole rows; set mesh.sequence to 1"):
        compiling.compile_step(small(STREAMS["b200"], mesh="sequence"), STAGES["joint"], described("b200"))


def test_kernels_that_a_gpu_does_not_have():
    with pytest.raises(UserError, match="needs compute capability 9.0, but NVIDIA A100-SXM4-80GB has 8.0; .*'triton'"):
        compiling.compile_step(small(STREAMS["b200"]), STAGES["joint"], described("a100-80"))
    wide = STREAMS["a100-80"] | dict(deep=("cudnn", 256))
    with pytest.raises(UserError, match="heads of a multiple of 8 channels up to 128"):
        compiling.compile_step(small(wide), STAGES["joint"], described("a100-80"))


@pytest.mark.parametrize("gpu", STREAMS)
def test_a_stage_of_a_codec_with_a_discriminator(gpu, monkeypatch):
    """Convolutions, which cuDNN computes, are counted. XLA's own products by Triton do not take DINOv2's odd tokens."""
    config = configs.load("fae_dinov2_g", ["mesh.fsdp=4"], runlocal=True, kinds=(configs.CODEC,))
    row = CODEC_STAGES["pixels_tuned"]
    topology = hardware.parse_topology(f"{gpu}:4")
    if gpu == "h100":
        with pytest.raises(UserError, match="set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false"):
            plan.plan_codec_step(config, row, topology, described(gpu))
    monkeypatch.setitem(compiling.GPU_OPTIONS, "xla_gpu_enable_triton_gemm", False)  # as XLA_FLAGS does
    made = plan.plan_codec_step(config, row, topology, described(gpu))
    assert made.hardware_by_hand <= made.flops_compiled < 1.15 * made.hardware_by_hand  # small arrays: products, too
    assert made.flops_by_hand["discriminator"] > 0.15 * made.flops_compiled


@pytest.mark.parametrize("gpu", STREAMS)
def test_the_samplers_steps(gpu):
    programs = compiling.compile_sampler(small(STREAMS[gpu]), STAGES["joint"], described(gpu), 4, 128)
    assert set(programs) == {"read", "write"}
