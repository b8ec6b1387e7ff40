"""Programs that cannot run here are compiled ahead of time for TPUs, in a separate process."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu
PROGRAM = r"""
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from starflow2_jax.parallel import sharding
from starflow2_jax.models.kernels import attend_packed
from starflow2_jax.models.layers import Transformer, TransformerConfig

devices = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices


def compile(mesh, f, *args):
    mesh = sharding.make_mesh(**mesh, devices=devices)
    with jax.set_mesh(mesh):
        args = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args,
                            sharding.tree_shardings(args, mesh))
        return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()


for H, J, mesh in ((8, 2, dict(data=1, fsdp=2, tensor=2)), (4, 4, dict(data=1, fsdp=2, sequence=2)),
                   (8, 2, dict(data=1, sequence=2, tensor=2))):
    q, k = (jax.ShapeDtypeStruct((2, 512, n, 128), jnp.bfloat16) for n in (H, J))
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attend_packed(q, k, v, ids, "splash").astype(jnp.float32))

    text = compile(mesh, jax.grad(loss, (0, 1, 2)), q, k, k, ids)
    names = set(re.findall(r"splash_mha_([a-z]+)", text))
    print("kernels", H, J, mesh, *sorted(names))

cfg = TransformerConfig(layers=2, width=256, heads=2, mlp_hidden=512, dtype="bfloat16", kernel="splash", remat="REMAT")
x = jax.ShapeDtypeStruct((4, 256, 256), jnp.bfloat16)
model = Transformer(cfg)
params = jax.eval_shape(lambda: Transformer(TransformerConfig(layers=2, width=256, heads=2, mlp_hidden=512)).init(
    jax.random.key(0), jnp.zeros((1, 1, 256)), None))


def gradient(params, x):
    return jax.grad(lambda p: jnp.sum(model.apply(p, x, None)[0].astype(jnp.float32) ** 2))(params)


text = compile(dict(data=1, fsdp=4), gradient, params, x)
print("gathered", *sorted({t for line in text.splitlines() if " all-gather" in line
                           for t in re.findall(r"(f32|bf16)\[[0-9,]*(?:256|512)[0-9,]*\]", line)}))
"""


def compiled(policy: str) -> str:
    """The output of the program."""
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_ACCELERATOR_TYPE="v5p-8",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        XLA_FLAGS="",
    )
    program = PROGRAM.replace("REMAT", policy)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_tpu_compiler_takes_splash_attention_and_gathers_small_types():
    out = compiled("dots")
    kernels = [line for line in out.splitlines() if line.startswith("kernels")]
    assert len(kernels) == 3 and all({"fwd", "dq", "dkv"} <= set(line.split()) for line in kernels), out
    assert "gathered bf16\n" in out  # weights are cast before they are gathered
