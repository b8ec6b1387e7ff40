"""Compares the roofline of `starflow2 plan` with step times that others published for clusters of NVIDIA GPUs.

    pip install -e ".[cuda]"
    python benchmarks/roofline.py

The table PUBLISHED has measurements of MPT models from MosaicML's llm-foundry (scripts/train/benchmarking/README.md):
plain decoders, trained in bfloat16 with parameters, gradients and optimizer spread over all GPUs. The script builds a
decoder of the same sizes from this package's layers, compiles its training step for the described GPUs, and prints one
line for each measurement: the published seconds of a step, the predicted ones, and their ratio. It needs no GPU and a
minute for each. The published programs are PyTorch's and not these, so the ratio tells how optimistic the roofline is,
and no more.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from starflow2_jax.models.layers import Transformer, TransformerConfig
from starflow2_jax.parallel import hardware, sharding
from starflow2_jax.planning import compiling
from starflow2_jax.planning.costs import Analysis
from starflow2_jax.planning.hlo import Module

LENGTH, WORDS = 2048, 50368  # positions of a row; words of MPT's vocabulary


@dataclass(frozen=True)
class Run:
    """A published measurement."""

    topology: str
    layers: int
    width: int
    rows: int  # of all GPUs
    accumulate: int
    remat: str
    tokens_per_second: float  # of all GPUs

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.rows * LENGTH / self.tokens_per_second


PUBLISHED = (
    Run("h100:8", 32, 4096, 48, 1, "none", 85144),
    Run("h100:8x8", 40, 5120, 128, 1, "none", 307209),
    Run("a100-80:8", 32, 4096, 96, 2, "none", 37130),
    Run("a100-40:8x8", 32, 4096, 1152, 1, "full", 234614),
)


def predicted(run: Run) -> float:
    """Seconds of a step by the roofline."""
    topology = hardware.parse_topology(run.topology)
    devices = compiling.described_devices(topology)
    mesh = sharding.make_mesh(data=1, fsdp=-1, devices=devices)
    cfg = TransformerConfig(
        run.layers, run.width, run.width // 128, 4 * run.width, dtype="bfloat16", remat=run.remat, kernel="cudnn"
    )
    optimizer = optax.adamw(1e-4)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(partial(_parameters, cfg))
        state = sharding.abstract((params, jax.eval_shape(optimizer.init, params)), mesh)
        tokens = jax.ShapeDtypeStruct((run.rows, LENGTH), jnp.int32, sharding=sharding.batch_sharding(mesh))
        layout = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(partial(_step, cfg, optimizer, run.accumulate), donate_argnums=0, out_shardings=layout)
        compiled = compiling.compile_for(devices, step, state, tokens)
    places = topology.places(list(mesh.devices.flat))
    return Analysis(Module(compiled.as_text() or ""), topology, dict(mesh.shape), places).costs.seconds


def _parameters(cfg: TransformerConfig) -> dict:
    stack = Transformer(cfg).init(jax.random.key(0), jnp.zeros((1, 128, cfg.width)), None)["params"]
    return {"token_embedding": {"embedding": jnp.zeros((WORDS, cfg.width))}, "stack": stack}


def _loss(cfg: TransformerConfig, params: dict, tokens: jax.Array) -> jax.Array:
    table = params["token_embedding"]["embedding"].astype(jnp.bfloat16)
    x = sharding.constrain(table[tokens], "batch", "sequence", "embed")
    y, _ = Transformer(cfg).apply({"params": params["stack"]}, x, None)
    logits = jnp.einsum("bse,ve->bsv", y, table).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def _step(cfg: TransformerConfig, optimizer, accumulate: int, state: tuple, tokens: jax.Array) -> tuple:
    params, moments = state
    parts = tokens.reshape(-1, accumulate, LENGTH).swapaxes(0, 1)

    def add(total, part):
        gradient = jax.grad(partial(_loss, cfg))(params, part)
        return jax.tree.map(jnp.add, total, gradient), None

    gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for run in PUBLISHED:
        seconds = predicted(run)
        size = f"{run.layers} layers of width {run.width}, {run.rows} rows, remat {run.remat}"
        print(
            f"{run.topology}, {size}: {run.seconds:.3f} s published, {seconds:.3f} s predicted, "
            f"{run.seconds / seconds:.2f} times"
        )
