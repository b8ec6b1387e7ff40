"""SigLIP's vision encoder: tiny random models of `transformers`, saved and imported, against their own outputs; published
sizes by shape.
"""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from starflow2_jax.models.dinov2 import DinoEncoder
from starflow2_jax.weights.dinov2 import abstract_params
from starflow2_jax.weights.siglip import import_siglip, load_siglip, siglip_config, table
from starflow2_jax.weights.table import WeightError, expected, source_shape

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(image_size=24, patch_size=4, layer_norm_eps=1e-2)
WORDS = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50000)
SAME, AS_MANY, SMALLER, LARGER = (6, 6), (4, 9), (3, 5), (8, 11)  # grids of patches beside the position embedding's
TOLERANCE = 1e-4


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter random."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.data = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
    return model.eval()


@pytest.fixture(scope="module")
def vision():
    return randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)))


@pytest.fixture(params=["vision", "vision of transformers 4", "whole"])
def folder(request, vision, tmp_path):
    """The same encoder as each of the forms in which folders hold it."""
    if request.param == "whole":
        whole = transformers.SiglipModel(transformers.SiglipConfig(vision_config=SMALL, text_config=WORDS))
        whole.vision_model.load_state_dict(vision.state_dict())
        whole.save_pretrained(tmp_path)
    else:
        vision.save_pretrained(tmp_path)
    if "4" in request.param:
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({f"vision_model.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("grid", [SAME, AS_MANY, SMALLER, LARGER])
def test_features(folder, vision, grid):
    """The same numbers as the reference, whose own files our importer reads."""
    h, w = grid
    cfg, params = load_siglip(folder)
    images = np.random.default_rng(1).standard_normal((2, 4 * h, 4 * w, 3)).astype(np.float32)
    with torch.no_grad():
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
        want = vision(channels_first, interpolate_pos_encoding=True).last_hidden_state.reshape(2, h, w, 32).numpy()
    got = jax.jit(DinoEncoder(cfg).apply)({"params": params}, images)
    assert np.abs(want).mean() > 0.3  # the tolerance is absolute
    np.testing.assert_allclose(got.patches, want, atol=TOLERANCE)
    assert got.class_token.shape == got.registers.shape == (2, 0, 32)


def test_published_sizes():
    """siglip2-base-patch16-256: the defaults of `transformers`; every tensor has its place, by shape alone."""
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=256))
    cfg = siglip_config({"model_type": "siglip", "vision_config": {"image_size": 256}})
    assert (cfg.layers, cfg.width, cfg.mlp_hidden, cfg.grid, cfg.patch) == (12, 768, 3072, 16, 16)
    file = {name: tuple(x.shape) for name, x in model.state_dict().items() if not name.startswith("head.")}
    tree = abstract_params(cfg)
    wanted, faults = expected(table(file), tree)
    assert not faults and {name: source_shape(*w, file.get(name, ())) for name, w in wanted.items()} == file
    assert sum(x.size for x in jax.tree.leaves(tree)) == sum(int(np.prod(shape)) for shape in file.values())


def refused(function, *args) -> str:
    with pytest.raises(WeightError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "siglip2_vision_model"}, "names the model_type 'siglip2_vision_model'; known are siglip and"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"image_size": [24, 28]}, "image_size = [24, 28] is not supported"),
        ({"num_channels": 1}, "num_channels = 1 is not supported"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps = 'small' is not supported"),
        ({"num_attention_heads": 5}, "num_attention_heads does not divide hidden_size"),
    ],
)
def test_configs_we_cannot_do(change, message):
    got = refused(siglip_config, SMALL | {"model_type": "siglip_vision_model"} | change)
    assert message in got and "\n" not in got


def test_broken_folders(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    more = {"classifier.weight": np.zeros((10, 32), np.float32)}
    assert "unexpected tensor classifier.weight (10, 32)" in refused(import_siglip, tensors | more, config)
    del tensors["post_layernorm.bias"]
    assert "missing tensor post_layernorm.bias, of norm/bias" in refused(import_siglip, tensors, config)
    (tmp_path / "config.json").write_text("[1]")
    assert "does not hold a JSON object" in refused(load_siglip, tmp_path)
