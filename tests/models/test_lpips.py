"""LPIPS against the same distance in PyTorch: random weights, in the names of torchvision's and of the `lpips`
package's file.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from starflow2_jax.models.lpips import Lpips
from starflow2_jax.weights.lpips import load_lpips
from starflow2_jax.weights.table import WeightError

PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")  # torchvision's "D"
TAPS = (4, 9, 16, 23, 30)  # layers of it before which the package reads the features


class Reference(nn.Module):
    """VGG-16's features as torchvision lays them out, and the distance of arXiv 1801.03924, equation 1."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in PLAN:
            layers += [nn.MaxPool2d(2)] if width == "M" else [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = channels if width == "M" else width
        self.features = nn.Sequential(*layers)
        for i, width in enumerate((64, 128, 256, 512, 512)):
            dropout_and_map = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": dropout_and_map}))

    def taps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        return [nn.functional.normalize(self.features[:last](x), dim=1) for last in TAPS]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = enumerate(zip(self.taps(a), self.taps(b), strict=True))
        return sum(self.get_submodule(f"lin{i}.model.1")((x - y) ** 2).mean((1, 2, 3)) for i, (x, y) in pairs)


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.manual_seed(0)
    model = Reference().eval()
    for i in range(5):
        model.get_submodule(f"lin{i}.model.1").weight.data.abs_()
    return model


def files(model: Reference, folder: Path, suffix: str, without: str = "") -> tuple[Path, Path]:
    """VGG's file, with one small tensor of the classifier, which nothing reads; and that of the linear layers."""
    state = {k: v for k, v in model.state_dict().items() if k != without} | {"classifier.0.bias": torch.zeros(3)}
    paths = folder / f"vgg16{suffix}", folder / f"linear{suffix}"
    for path, linear in zip(paths, (False, True), strict=True):
        save = torch.save if suffix == ".pth" else save_file
        save({key: value for key, value in state.items() if key.startswith("lin") == linear}, path)
    return paths


@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_distances_are_those_of_pytorch(reference, suffix, tmp_path):
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = reference(*(torch.tensor(x).permute(0, 3, 1, 2) for x in pictures)).numpy()
    found = Lpips().apply({"params": load_lpips(*files(reference, tmp_path, suffix))}, *pictures)
    assert wanted.shape == (3,) and wanted.min() > 1e-4
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_equal_pictures_have_no_distance_and_the_gradient_is_finite(reference, tmp_path):
    params = load_lpips(*files(reference, tmp_path, ".pth"))
    gray = np.zeros((1, 16, 16, 3), np.float32)
    assert float(Lpips().apply({"params": params}, gray, gray)[0]) == 0
    gradient = jax.grad(lambda x: Lpips().apply({"params": params}, x, gray).sum())(gray + 0.1)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_a_file_that_lacks_a_tensor_is_refused(reference, tmp_path):
    with pytest.raises(WeightError, match="missing tensor features.5.bias"):
        load_lpips(*files(reference, tmp_path, ".safetensors", without="features.5.bias"))
