"""Flow models imported from reference weights give the reference's numbers (tests/golden/README.md)."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.models.flow import Context, Flow
from starflow2_jax.models.patches import patchify, unpatchify
from starflow2_jax.sampling import guidance
from starflow2_jax.weights.flow import import_flow

HERE = Path(__file__).parents[1] / "golden"


def files_of(folder: Path) -> list[Path]:
    """Raises FileNotFoundError where there are none: a test of nothing would pass."""
    if not (files := sorted(folder.glob("*.npz"))):
        raise FileNotFoundError(f"{folder.resolve()} (STARFLOW2_GOLDEN) has no .npz file")
    return files


FOLDERS = [HERE, *(Path(p) for p in [os.environ.get("STARFLOW2_GOLDEN")] if p)]
FILES = [file for folder in FOLDERS for file in files_of(folder)]
TOLERANCE = 1e-4  # of the largest number


def tokens(images, patch=1):
    """(B, C, height, width) -> (B, N, D)."""
    x = patchify(jnp.moveaxis(images, 1, -1), patch)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def images(h, side, channels, patch=1):
    """(B, N, D) -> (B, C, height, width)."""
    return jnp.moveaxis(unpatchify(h.reshape(h.shape[0], side, side, -1), patch, channels), -1, 1)


def load(file):
    with np.load(file, allow_pickle=False) as f:
        given = {name: f[name] for name in f.files if name != "config"}
        return given, json.loads(str(f["config"]))


def imported(given, config):
    tensors = {name.removeprefix("param/"): value for name, value in given.items() if name.startswith("param/")}
    blocks, params = import_flow(tensors, config)
    return blocks, jax.tree.map(jnp.asarray, params)


def tarflow(given, config):
    """All quantities of a TarFlow file, and the names of its inputs."""
    blocks, params = imported(given, config)
    flow, patch, channels = Flow(blocks), config["patch_size"], config["in_channels"]
    side, weight, label = blocks[0].grid[0], config["guidance"], Context(label=given["y"])

    def forward(x, y):
        states, logdets = flow.apply({"params": params}, tokens(x, patch), Context(label=y), method=Flow.trace)
        return states, sum(logdets)

    def loss(x, y):
        states, logdet = forward(x, y)
        return 0.5 * jnp.mean(states[-1] ** 2) - jnp.mean(logdet)

    @jax.jit
    def sample(noise):
        def inverse(*args):
            h = flow.apply({"params": params}, noise, *args, method=Flow.inverse)
            return images(h, side, channels, patch)

        steady, annealed = (guidance.linear(weight, side**2, annealed) for annealed in (False, True))
        return {
            "sample": inverse(label),
            "sample_guided": inverse(label, Context(), steady),
            "sample_guided_annealed": inverse(label, Context(), annealed),
            "sample_uncond_temp": inverse(
                Context(),
                Context(),
                guidance.linear(config["uncond_guidance"], side**2),
                config["uncond_attn_temp"],
            ),
        }

    states, logdet = jax.jit(forward)(given["x"], given["y"])
    dropped, logdet_dropped = jax.jit(forward)(given["x"], given["y_dropped"])
    value, grad = jax.jit(jax.value_and_grad(loss))(given["x"], given["y"])
    return {
        "z": states[-1],
        "logdet": logdet.mean((1, 2)),
        "z_dropped": dropped[-1],
        "logdet_dropped": logdet_dropped.mean((1, 2)),
        "loss": value,
        "grad_loss_x": grad,
        **{f"block_out_{i}": state for i, state in enumerate(states)},
        **sample(given["noise"]),
    }, {"x", "y", "y_dropped", "noise"}


def starflow(given, config):
    """All quantities of a STARFlow file, and the names of its inputs."""
    blocks, params = imported(given, config)
    flow, side, channels = Flow(blocks), config["latent_size"], config["in_channels"]
    text, null = Context(prefix=given["text"]), Context(prefix=given["text_null"])

    @jax.jit
    def forward(x):
        return flow.apply({"params": params}, tokens(x), text, method=Flow.trace)

    @jax.jit
    def sample(noise):
        def inverse(*args):
            return images(flow.apply({"params": params}, tokens(noise), *args, method=Flow.inverse), side, channels)

        return {
            "sample": inverse(text),
            "sample_guided": inverse(text, null, guidance.gaussian_mixing(config["guidance"])),
        }

    states, logdets = forward(given["x"])
    z, logdet = states[-1], sum(logdets)
    order = [slice(None, None, -1) if block.flip else slice(None) for block in blocks]
    grid = jnp.stack([tokens(given["x"]), *states])
    return {
        "z": images(z, side, channels),
        **{f"logdet_{i}": d[:, o] for i, (d, o) in enumerate(zip(logdets, order, strict=True))},
        **{f"block_in_{i}": x.reshape(-1, side, side, channels) for i, x in enumerate(grid)},
        "loss": 0.5 * jnp.mean(z**2) - jnp.mean(logdet),
        "loss_z": 0.5 * jnp.mean(z**2),
        "loss_logdet": -logdet.mean(),
        **sample(given["noise"]),
    }, {"x", "text", "text_null", "noise"}


def test_the_files_are_there(tmp_path):
    names = {file.stem for file in FILES if file.parent == HERE}
    assert names == {"starflow_latent", "starflow_latent_gated", "tarflow_pixel"}
    with pytest.raises(FileNotFoundError, match="no .npz file"):
        files_of(tmp_path / "none")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_reference_numbers(file):
    given, config = load(file)
    quantities, inputs = {"tarflow": tarflow, "starflow": starflow}[config["model"]](given, config)
    expected = {name for name in given if not name.startswith("param/")} - inputs
    assert set(quantities) == expected
    errors = {}
    for name in expected:
        ours, reference = np.asarray(quantities[name]), given[name]
        assert ours.shape == reference.shape, name
        errors[name] = float(np.abs(ours - reference).max() / np.abs(reference).max())
    assert not {name: error for name, error in errors.items() if not error <= TOLERANCE}
