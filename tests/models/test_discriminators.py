"""The discriminators and LPIPS against the same networks in PyTorch, with the same random weights."""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from starflow2_jax.models.discriminators import FeatureDiscriminator, PatchDiscriminator, largest_singular_value

RNG = np.random.default_rng(0)


def random_params(module, *inputs) -> dict:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: (0.3 * RNG.standard_normal(x.shape)).astype(np.float32), shapes)


def conv(x: torch.Tensor, p: dict) -> torch.Tensor:
    kernel = torch.tensor(p["kernel"]).permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, torch.tensor(p["bias"]), padding="same")


def norm(x: torch.Tensor, p: dict, groups: int) -> torch.Tensor:
    return F.group_norm(x, groups, torch.tensor(p["scale"]), torch.tensor(p["bias"]), 1e-5)


def test_the_patch_discriminator_is_the_same_network_in_pytorch():
    pictures = RNG.standard_normal((2, 16, 24, 3)).astype(np.float32)
    module = PatchDiscriminator(channels=8, stages=3)
    p = random_params(module, pictures)
    x = F.leaky_relu(conv(torch.tensor(pictures).permute(0, 3, 1, 2), p["first"]), 0.1)
    for i in range(3):
        x = F.avg_pool2d(conv(x, p[f"conv_{i}"]), 2)
        x = F.leaky_relu(norm(x, p[f"norm_{i}"], min(32, 8 * 2**i)), 0.1)
    x = conv(F.leaky_relu(conv(x, p["mix"]), 0.1), p["logits"])
    ours = module.apply({"params": p}, pictures)
    assert ours.shape == (2, 2, 3)
    np.testing.assert_allclose(ours, x[:, 0].numpy(), rtol=1e-4, atol=1e-4)


def test_the_largest_singular_value_and_its_gradient():
    """Of a matrix with one that stands out, so that a few turns of the power method find it."""
    matrix = RNG.standard_normal((12, 5)).astype(np.float32) + 4 * np.outer(np.ones(12), np.ones(5))
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(largest_singular_value(matrix), values[0], rtol=1e-5)
    theirs = torch.tensor(matrix, requires_grad=True)
    torch.linalg.matrix_norm(theirs, 2).backward()
    np.testing.assert_allclose(jax.grad(largest_singular_value)(matrix), theirs.grad, atol=1e-5)


def test_the_feature_discriminator_is_the_same_network_in_pytorch():
    features = [RNG.standard_normal((2, 12, 4)).astype(np.float32) for _ in range(2)]
    module = FeatureDiscriminator(width=9)
    p = random_params(module, features)
    for head in p.values():  # one singular value stands out in each kernel
        for name in ("in_conv", "mid_conv"):
            head[name]["kernel"] = head[name]["kernel"] + 3

    def spectral(x: torch.Tensor, p: dict) -> torch.Tensor:
        kernel = torch.tensor(p["kernel"])
        kernel = kernel / torch.linalg.matrix_norm(kernel.reshape(-1, kernel.shape[-1]), 2)
        half = kernel.shape[0] // 2
        x = F.pad(x, (half, half), mode="circular") if half else x
        return F.conv1d(x, kernel.permute(2, 1, 0), torch.tensor(p["bias"]))

    def head(x: torch.Tensor, p: dict) -> torch.Tensor:
        x = F.leaky_relu(norm(spectral(x, p["in_conv"]), p["in_norm"], 4), 0.2)
        y = F.leaky_relu(norm(spectral(x, p["mid_conv"]), p["mid_norm"], 4), 0.2)
        return spectral((x + y) / 2**0.5, p["out"])[:, 0]

    theirs = [head(torch.tensor(x).permute(0, 2, 1), p[f"head_{i}"]) for i, x in enumerate(features)]
    ours = module.apply({"params": p}, features)
    assert ours.shape == (2, 24)
    np.testing.assert_allclose(ours, torch.cat(theirs, 1).numpy(), rtol=1e-4, atol=1e-4)
