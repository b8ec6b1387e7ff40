"""The features of EfficientNet-Lite0, beside the package's own forward pass."""

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet

from starflow2_jax.evaluation import efficientnet


def test_they_lead_to_the_networks_own_logits():
    levels = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3))  # as large as pictures are made
    made = efficientnet.features((levels / 127.5 - 1).astype(np.float32), batch=2)
    network = efficientnet._network()
    assert isinstance(network, EfficientNet) and made.shape == (3, 1280)
    with torch.inference_mode():
        want = network(torch.tensor((levels.transpose(0, 3, 1, 2) - 127) / 128, dtype=torch.float32))
        got = network._fc(torch.from_numpy(made))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
