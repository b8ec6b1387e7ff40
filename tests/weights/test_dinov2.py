"""DINOv2: tiny random models of `transformers`, saved and imported, against their own outputs; published sizes by
shape.
"""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from starflow2_jax.models.dinov2 import DinoConfig, DinoEncoder
from starflow2_jax.weights.dinov2 import abstract_params, dinov2_config, import_dinov2, load_dinov2, table
from starflow2_jax.weights.table import WeightError, expected, source_shape

PLAIN = {"num_hidden_layers": 2, "image_size": 24, "patch_size": 4, "layer_norm_eps": 1e-2}
SMALL = PLAIN | {"hidden_size": 32, "num_attention_heads": 4}
GATED = PLAIN | {"hidden_size": 40, "num_attention_heads": 2, "use_swiglu_ffn": True}  # hidden 106 -> 112
SAME, AS_MANY, SMALLER, LARGER = (6, 6), (4, 9), (3, 5), (8, 11)  # grids of patches beside the position embedding's
FEW = {"num_register_tokens": 3, "qkv_bias": False, "mlp_ratio": 3}
MODELS = {  # each of the two classes sees each grid
    "plain": ("Dinov2", SMALL, (SAME, AS_MANY)),
    "gated": ("Dinov2", GATED, (SMALLER, LARGER)),
    "plain_registers": ("Dinov2WithRegisters", SMALL | FEW, (SAME, LARGER)),
    "gated_registers": ("Dinov2WithRegisters", GATED | {"num_register_tokens": 1}, (AS_MANY, SMALLER)),
}
TOLERANCE = 1e-4

GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
SIZES = {  # of the published models: millions of parameters, mask token included
    "base": ("Dinov2", {}, 86.58),
    "large": ("Dinov2", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 304.37),
    "giant": ("Dinov2", GIANT, 1136.48),
    "giant_registers": ("Dinov2WithRegisters", GIANT, 1136.49),
}


def reference(kind: str, **options):
    cls = getattr(transformers, f"{kind}Model")
    return cls(getattr(transformers, f"{kind}Config")(**options)).eval()


def randomised(kind: str, **options):
    """A reference model with every parameter random."""
    model = reference(kind, **options)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        scale = name.endswith(("lambda1", "norm1.weight", "norm2.weight", "layernorm.weight"))
        value.data = 1 + 0.3 * noise if scale else 0.3 * noise
    return model


@pytest.mark.parametrize("name", MODELS)
def test_features(name, tmp_path):
    """The same numbers as the reference, whose own files our importer reads."""
    kind, options, grids = MODELS[name]
    model = randomised(kind, **options)
    model.save_pretrained(tmp_path)
    cfg, params = load_dinov2(tmp_path)
    first = 1 + options.get("num_register_tokens", 0)
    for h, w in grids:
        images = np.random.default_rng(1).standard_normal((2, 4 * h, 4 * w, 3)).astype(np.float32)
        with torch.no_grad():
            states = model(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state.numpy()
        ours = jax.jit(DinoEncoder(cfg).apply)({"params": params}, images)
        patches = states[:, first:].reshape(2, h, w, cfg.width)
        assert np.abs(patches).mean() > 0.3  # the tolerance is absolute
        for part, want in {"patches": patches, "class_token": states[:, :1], "registers": states[:, 1:first]}.items():
            got = getattr(ours, part)
            assert got.shape == want.shape
            assert np.abs(got - want).max(initial=0) <= TOLERANCE, (part, h, w)


def published(size: str):
    """The reference model without memory, and its count of parameters in millions."""
    kind, options, millions = SIZES[size]
    with torch.device("meta"):
        return reference(kind, image_size=518, patch_size=14, **options), millions


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    """Same names, same shapes and as many parameters as the reference, at full size, by shape alone."""
    model, millions = published(size)
    file = {name: tuple(x.shape) for name, x in revert_weight_conversion(model, model.state_dict()).items()}
    assert file.pop("embeddings.mask_token") == (1, model.config.hidden_size)
    cfg = dinov2_config(model.config.to_dict())
    tree = abstract_params(cfg)
    wanted, faults = expected(table(cfg), tree)
    assert not faults and {name: source_shape(*w, file.get(name, ())) for name, w in wanted.items()} == file
    count = sum(x.size for x in jax.tree.leaves(tree))
    assert count == sum(int(np.prod(shape)) for shape in file.values())
    assert abs((count + cfg.width) / 1e6 - millions) < 0.005


def test_giant_config():
    cfg = dinov2_config(published("giant")[0].config.to_dict())
    assert cfg == DinoConfig(layers=40, width=1536, heads=24, mlp_hidden=4096, grid=37, gated_mlp=True)


@pytest.fixture
def saved(tmp_path):
    reference("Dinov2WithRegisters", **SMALL).save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())


def refused(function, *args) -> str:
    with pytest.raises(WeightError) as error:
        function(*args)
    return str(error.value)


def test_what_may_and_what_must_not_be_there(saved):
    _, tensors, config = saved
    del tensors["embeddings.mask_token"]  # not every checkpoint has it
    import_dinov2(tensors, config)
    head = {"classifier.weight": np.zeros((10, 64), np.float32)}
    assert "unexpected tensor classifier.weight (10, 64)" in refused(import_dinov2, tensors | head, config)
    message = refused(import_dinov2, tensors, config | {"model_type": "dinov2"})
    assert "(1 faults)" in message and "unexpected tensor embeddings.register_tokens (1, 4, 32)" in message
    del tensors["embeddings.register_tokens"]
    assert "missing tensor embeddings.register_tokens, of registers" in refused(import_dinov2, tensors, config)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model_type", "vit", "names the model_type 'vit'; known are dinov2 and dinov2_with_registers"),
        ("hidden_act", "relu", "hidden_act = 'relu' is not supported"),
        ("image_size", [24, 28], "image_size = [24, 28] is not supported"),
        ("patch_size", None, "patch_size is missing"),
        ("num_channels", 1, "num_channels = 1 is not supported"),
        ("num_register_tokens", 0, "num_register_tokens = 0 is not supported"),
        ("num_attention_heads", 5, "num_attention_heads does not divide hidden_size"),
        ("mlp_ratio", float("inf"), "mlp_ratio = inf is not supported"),
        ("mlp_ratio", [4], "mlp_ratio = [4] is not supported"),
        ("model_type", ["dinov2"], "names the model_type ['dinov2']; known are"),
        ("head_dim", 16, "head_dim = 16 is not supported"),
    ],
)
def test_configs_we_cannot_do(saved, name, value, message):
    got = refused(dinov2_config, saved[2] | {name: value})
    assert message in got and "\n" not in got


def test_a_folder_of_several_files(saved, tmp_path_factory):
    folder, _, _ = saved
    shards = tmp_path_factory.mktemp("shards")
    transformers.Dinov2WithRegistersModel.from_pretrained(folder).save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    (one, params), (several, same) = load_dinov2(folder), load_dinov2(shards)
    assert one == several and jax.tree.structure(params) == jax.tree.structure(same)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))


def test_broken_folders(saved):
    folder, tensors, _ = saved
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "holds neither model.safetensors nor" in refused(load_dinov2, folder)
    save_file(tensors, folder / "model.safetensors")
    for text, message in {"{": "is not valid JSON (Expecting", "[1]": "does not hold a JSON object"}.items():
        (folder / "config.json").write_text(text)
        assert message in refused(load_dinov2, folder)
    assert "there is no folder" in refused(load_dinov2, folder / "nowhere")
