"""Frozen encoders: pixels of any size become tokens of features, as in the reference library and as the VLM sees
them.
"""

import jax
import numpy as np
import pytest
import torch
import transformers

from starflow2_jax.models.dinov2 import DinoConfig
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.models.qwen_vision import VisionConfig, VisionTower
from starflow2_jax.sequence import VisionInput
from starflow2_jax.weights.dinov2 import load_dinov2

TOWER = VisionConfig(
    layers=2,
    width=32,
    heads=2,
    mlp_hidden=48,
    out_width=20,
    patch=4,
    window=8,
    full_attention_layers=(1,),
    min_pixels=64,
)
VIT = DinoConfig(layers=2, width=24, heads=2, mlp_hidden=32, grid=4, patch=8)


def pictures(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def features(kind, cfg, params, pixels, grid):
    return np.asarray(jax.jit(ENCODERS[kind].features, static_argnums=(0, 3))(cfg, params, pixels, grid))


def test_dinov2_features(tmp_path):
    """Pictures of 24 x 16 pixels, resized to 4 x 6 patches of 4 pixels on the device, against PyTorch."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 4}
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    cfg, params = load_dinov2(tmp_path)
    pixels = pictures(2, 24, 16, 3)
    x = torch.from_numpy((pixels + 1) / 2).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (16, 24), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
    with torch.no_grad():
        want = model((x - mean) / std).last_hidden_state[:, 5:].numpy()
    got = features("dinov2", cfg, params, pixels, (4, 6))
    assert got.shape == (2, 24, 32) and np.abs(want).mean() > 0.3
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_tower_features():
    """The same tokens as the tower makes of a picture that the host has prepared."""
    params = ENCODERS["vlm"].init(TOWER, jax.random.key(0))
    pixels = pictures(2, 16, 24, 3)  # 2 x 3 merged tokens of 8 pixels
    ready = [TOWER.preprocess(picture) for picture in pixels]
    batch = {name: np.stack([each[name] for each in ready]) for name in ready[0]}
    want = VisionTower(TOWER).apply({"params": params}, VisionInput(**batch, image=np.ones_like(batch["window"])))
    got = features("vlm", TOWER, params, pixels, (2, 3))
    assert got.shape == (2, 6, 20) and np.ptp(got) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind, cfg", [("vit", VIT), ("vlm", TOWER)])
def test_new_parameters(kind, cfg):
    """A fresh encoder gives features of its width for other sizes and grids."""
    row = ENCODERS[kind]
    assert isinstance(cfg, row.config)
    params = row.init(cfg, jax.random.key(0))
    for grid in ((4, 4), (3, 5)):
        got = features(kind, cfg, params, pictures(1, 20, 30, 3), grid)
        assert got.shape == (1, grid[0] * grid[1], row.width(cfg)) and np.isfinite(got).all()
