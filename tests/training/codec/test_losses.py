"""The codec's losses against PyTorch, Monte Carlo and autograd, which share nothing with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

from starflow2_jax.training.codec import augmentation, losses

RNG = np.random.default_rng(0)
MADE, REAL = (RNG.standard_normal((3, 8, 8, 3)).astype(np.float32) for _ in range(2))
LOGITS = [2 * RNG.standard_normal((4, 6)).astype(np.float32) for _ in range(2)]


def equal(ours: object, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=2e-6, atol=1e-6)


def test_differences_of_pixels_are_those_of_pytorch():
    made, real = torch.tensor(MADE), torch.tensor(REAL)
    equal(losses.l1(MADE, REAL), F.l1_loss(made, real))
    equal(losses.l2(MADE, REAL), F.mse_loss(made, real))


def test_the_kl_is_that_of_pytorch_and_of_monte_carlo():
    mean, log_variance = RNG.standard_normal((2, 5, 4))
    theirs = torch.distributions.Normal(torch.tensor(mean), torch.tensor(np.exp(0.5 * log_variance)))
    standard = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
    equal(losses.kl(mean, log_variance), torch.distributions.kl_divergence(theirs, standard))
    x = mean + np.exp(0.5 * log_variance) * RNG.standard_normal((200_000, 5, 4))
    densities = [-0.5 * ((x - m) ** 2 / np.exp(v) + v) for m, v in ((mean, log_variance), (0, 0))]
    sampled = np.mean(densities[0] - densities[1], 0)
    np.testing.assert_allclose(losses.kl(mean, log_variance), sampled, atol=0.05)


def test_the_distance_of_features_is_that_of_pytorch():
    layers = [RNG.standard_normal((2, 2, 5, 7)).astype(np.float32) for _ in range(3)]
    theirs = [
        (F.normalize(torch.tensor(a), dim=-1) - F.normalize(torch.tensor(b), dim=-1)).square().sum(-1).mean()
        for a, b in layers
    ]
    equal(losses.feature_distance([a for a, _ in layers], [b for _, b in layers]), sum(theirs) / 3)


def test_adversarial_losses_are_those_of_pytorch():
    """The hinge as two margins, with torch's own hinge embedding loss where it has one."""
    real, made = map(torch.tensor, LOGITS)
    ones = -torch.ones_like(real)
    hinge = 0.5 * (F.hinge_embedding_loss(real, ones) + F.hinge_embedding_loss(-made, ones))
    equal(losses.hinge(*LOGITS), hinge)
    equal(losses.generator(LOGITS[1]), -made.mean())


@pytest.mark.parametrize("averages", ((0.3, -0.2), (-2.0, 3.0)))
def test_lecam_is_that_of_pytorch(averages):
    real, made = (torch.tensor(x).mean() for x in LOGITS)
    theirs = F.relu(real - averages[1]).pow(2) + F.relu(averages[0] - made).pow(2)
    equal(losses.lecam(LOGITS[0].mean(), LOGITS[1].mean(), *averages), theirs)


def test_the_adaptive_weight_is_that_of_pytorchs_autograd():
    """Two losses of a network of two layers; the weight looks at the last layer alone."""
    x, first, last, target = (RNG.standard_normal(shape).astype(np.float32) for shape in ((6, 3), (3, 4), (4, 2), (2,)))

    def both(last):
        y = jnp.tanh(x @ first) @ last
        return losses.l2(y, target), losses.generator(jnp.sin(y))

    gradients = [jax.grad(lambda last, i=i: both(last)[i])(last) for i in range(2)]
    kernel = torch.tensor(last, requires_grad=True)
    y = torch.tanh(torch.tensor(x @ first)) @ kernel
    terms = (y - torch.tensor(target)).square().mean(), -torch.sin(y).mean()
    norms = [torch.autograd.grad(term, kernel, retain_graph=True)[0].norm() for term in terms]
    equal(losses.adaptive_weight(*gradients), norms[0] / (norms[1] + 1e-6))
    assert float(losses.adaptive_weight(gradients[0], jnp.zeros(3))) == 1e4
    derivative = jax.grad(lambda scale: losses.adaptive_weight(scale * gradients[0], gradients[1]))(1.0)
    assert float(derivative) == 0


def test_what_moves_pictures_shifts_them_and_fills_in_zeros():
    down, right = np.array([1, 0, -2]), np.array([0, -3, 2])
    wanted = np.zeros_like(MADE)
    for i, (a, b) in enumerate(zip(down, right, strict=True)):
        for row in range(8):
            for column in range(8):
                if 0 <= row - a < 8 and 0 <= column - b < 8:
                    wanted[i, row, column] = MADE[i, row - a, column - b]
    np.testing.assert_allclose(augmentation.moved(MADE, down, right), wanted, atol=1e-6)


def test_recolouring_is_that_of_pytorch():
    for axes in ((3,), (1, 2, 3)):
        mean = torch.tensor(MADE).mean(axes, keepdim=True)
        equal(augmentation.recoloured(MADE, 1.7, axes), (torch.tensor(MADE) - mean) * 1.7 + mean)


def test_augmentations_are_drawn_for_each_picture_and_stay_within_their_limits():
    shifts = np.asarray(augmentation.shifts(jax.random.key(0), 500, 32))
    assert (shifts.min(), shifts.max()) == (-4, 4) and len(set(shifts.tolist())) == 9
    same = np.repeat(MADE[:1], 6, 0)
    found = np.asarray(augmentation.augmented(jax.random.key(1), same))
    assert len({picture.tobytes() for picture in found}) == 6
    gradient = jax.grad(lambda x: jnp.sum(augmentation.augmented(jax.random.key(1), x) ** 2))(MADE)
    assert float(optax.tree.norm(gradient)) > 0
