"""Weight tables: all faults are reported at once; files are read without unpickling."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from starflow2_jax.weights.flow import import_flow, starflow_blocks, tarflow_blocks
from starflow2_jax.weights.table import Ignore, Rule, WeightError, import_tensors, read_tensors

FILE = Path(__file__).parents[1] / "golden" / "tarflow_pixel.npz"
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.float32)}


@pytest.fixture
def tarflow():
    with np.load(FILE, allow_pickle=False) as file:
        return read_tensors(FILE), json.loads(str(file["config"]))


def refused(function, *args) -> str:
    with pytest.raises(WeightError) as error:
        function(*args)
    return str(error.value)


def test_all_faults_are_listed_together(tarflow):
    tensors, config = tarflow
    qkv = "blocks.3.attn_blocks.1.attention.qkv.weight"
    tensors["blocks.0.extra.weight"] = np.zeros(3)
    tensors["blocks.0.attn_blocks.2.mlp.norm.weight"] = np.zeros(64)  # a layer too many
    del tensors["blocks.0.proj_in.bias"], tensors["blocks.1.attn_blocks.0.attention.norm.weight"]
    tensors["blocks.1.proj_in.weight"] = tensors["blocks.1.proj_in.weight"].T
    tensors["blocks.1.class_embed"] = tensors["blocks.1.class_embed"][:, 0]
    tensors[qkv] = tensors[qkv][:-1]
    tensors["blocks.2.pos_embed"][3, 5] = np.nan
    tensors["blocks.2.proj_out.bias"] = np.arange(24)
    message, *lines = refused(import_flow, tensors, config).split("\n")
    assert message == "the weights do not fit (9 faults):"
    assert set(lines) == {
        "- unexpected tensor blocks.0.extra.weight (3,)",
        "- unexpected tensor blocks.0.attn_blocks.2.mlp.norm.weight (64,)",
        "- missing tensor blocks.0.proj_in.bias, of block_0/proj_in/bias",
        "- missing tensor blocks.1.attn_blocks.0.attention.norm.weight, of block_1/stack/layers/attention_norm/scale",
        "- tensor blocks.1.proj_in.weight has shape (12, 64) where (64, 12) is expected",
        "- tensor blocks.1.class_embed has shape (10, 64) where (10, 1, 64) is expected",
        f"- tensor {qkv} has shape (191, 64) where (192, 64) is expected",
        "- tensor blocks.2.pos_embed has 1 numbers that are not finite",
        "- tensor blocks.2.proj_out.bias holds int64, not floating point numbers",
    }


def test_axes_and_layers():
    """Stacked layers, a fused source, an axis of size 1 and a grouped target, against plain NumPy."""
    random = np.random.default_rng(0).standard_normal
    fused = [random((2 * 3 + 3 + 3, 5)) for _ in range(4)]
    patch, token = random((7, 3, 2, 2)), random((1, 7, 1))
    tree = {
        "q": np.empty((4, 5, 2, 3), np.float32),
        "k": np.empty((4, 5, 1, 3), np.float32),
        "v": np.empty((4, 5, 1, 3), np.float32),
        "patch": np.empty((12, 7), np.float32),
        "token": np.empty(7, np.float32),
    }
    table = (
        Rule("layers.{layer}.qkv", ("q", "k", "v"), "(h k) e -> e h k"),
        Rule("patch", "patch", "e c p q -> (c p q) e"),
        Rule("token", "token", "1 e 1 -> e"),
        Ignore(r"buffer\.\d+"),
    )
    tensors = {f"layers.{i}.qkv": x for i, x in enumerate(fused)} | {"patch": patch, "token": token, "buffer.12": patch}
    out = import_tensors(table, tensors, tree)
    for i, x in enumerate(fused):
        np.testing.assert_allclose(out["q"][i], x[:6].T.reshape(5, 2, 3), rtol=1e-6)
        np.testing.assert_allclose(out["k"][i], x[6:9].T.reshape(5, 1, 3), rtol=1e-6)
        np.testing.assert_allclose(out["v"][i], x[9:].T.reshape(5, 1, 3), rtol=1e-6)
    np.testing.assert_allclose(out["patch"], patch.reshape(7, 12).T, rtol=1e-6)
    np.testing.assert_allclose(out["token"], token[0, :, 0], rtol=1e-6)
    tensors |= {"patch": random((7, 1, 5, 2)), "layers.3.qkv": fused[0].T, "token": token[0, :, 0]}
    message = refused(import_tensors, table, tensors, tree)
    assert all(f"tensor {name} has shape" in message for name in ("patch", "layers.3.qkv", "token"))


def test_faults_of_the_table():
    tree = {name: np.empty(4, np.float32) for name in "abcd"}
    table = (Rule("x", "a"), Rule("x", "b"), Rule("y", "a"), Rule("z", ("c", "e")), Ignore("y"))
    message = refused(import_tensors, table, {"x": np.ones(4), "y": np.ones(4)}, tree)
    assert "tensor x belongs to two rules, a and b" in message
    assert "parameter a is filled by two rules, x and y" in message
    assert "rule z: the model has c but no e" in message
    assert "parameter d (4,) is filled by no rule" in message
    assert "tensor y belongs to a rule, but another rule says to ignore it" in message


def save_torch(path, tensors):
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)


WRITERS = {
    ".npz": lambda path, tensors: np.savez(path, **tensors),
    ".safetensors": lambda path, tensors: save_file(tensors, path),
    ".pt": save_torch,
    ".pth": save_torch,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_are_read(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix](path, TENSORS)
    tensors = read_tensors(path)
    assert set(tensors) == set(TENSORS) and "missing" not in tensors
    for name, value in TENSORS.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], value)


def test_only_the_parameters_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **{"param/w": np.ones(3), "z": np.ones(2)})
    assert set(read_tensors(tmp_path / "a.npz")) == {"w"}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80\x04N."])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix](path, TENSORS)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(read_tensors, path)
    assert message.startswith(f"{path} cannot be read: ") and "\n" not in message


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".pth"])
@pytest.mark.parametrize("write", ["pickle", "format"])
def test_pickles_are_refused(tmp_path, suffix, write):
    """Neither a bare pickle nor one inside the format's own container is executed."""
    path, touched = tmp_path / f"weights{suffix}", tmp_path / "touched"
    if write == "pickle":
        path.write_bytes(pickle.dumps({"w": Exploit(touched)}))
    elif suffix == ".npz":
        np.savez(path, w=np.array([Exploit(touched)], dtype=object))
    else:
        torch.save({"w": Exploit(touched)}, path)
    assert "cannot be read" in refused(read_tensors, path)
    assert not touched.exists()


def test_one_sentence_for_what_is_not_there(tmp_path, monkeypatch):
    assert refused(read_tensors, tmp_path / "no.npz") == f"there is no file {tmp_path / 'no.npz'}"
    assert "is no .npz, .safetensors, .pt or .pth file" in refused(read_tensors, tmp_path / "weights.ckpt")
    save_torch(tmp_path / "a.pt", TENSORS)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'starflow2_jax[torch]'" in refused(read_tensors, tmp_path / "a.pt")


def test_options(tarflow):
    """Null is absent, absent is the default; what we cannot do is refused, not passed over."""
    config = tarflow[1]
    blocks = tarflow_blocks(config | {"head_dim": None, "layers_per_block": [1, 2, 3, 4]})
    assert [block.transformer.layers for block in blocks] == [1, 2, 3, 4]
    assert [block.flip for block in blocks] == [False, True, False, True]
    assert "option channels is missing" in refused(tarflow_blocks, config | {"channels": None})
    assert "nvp = False is not supported" in refused(tarflow_blocks, config | {"nvp": False})
    assert "'glow'" in refused(import_flow, {}, config | {"model": "glow"})
    latent = {"in_channels": 4, "latent_size": 4, "channels": 128, "layers_per_block": [1, 2]}
    blocks = starflow_blocks(latent)
    assert [(b.flip, b.start, b.scale, b.positions) for b in blocks] == [
        (False, "shift", "exp", "learned"),
        (True, "shift", "exp", "learned"),
    ]
    assert (blocks[0].transformer.heads, blocks[0].transformer.kv, blocks[0].transformer.norm) == (2, 2, "layer")
    text = {"txt_size": 3, "txt_dim": 5, "cond_top_only": True, "seq_order": "L2R"}
    blocks = starflow_blocks(latent | text)
    assert [(b.flip, b.prefix_channels, b.rotary_text) for b in blocks] == [(True, 0, True), (False, 5, True)]
    assert "temporal_causal = 1" in refused(starflow_blocks, latent | {"temporal_causal": 1})


def test_prior_variance_of_tarflow(tarflow):
    tensors, config = tarflow
    import_flow(tensors | {"var": np.ones((16, 12), np.float32)}, config)
    assert "tensor var" in refused(import_flow, tensors | {"var": np.full((16, 12), 2.0)}, config)
