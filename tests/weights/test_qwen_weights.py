"""Qwen2.5-VL's weights: every tensor arrives in its place and comes back bit for bit, in the memory of one tensor."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from reference_qwen import INDEX, STAND_INS, bits, make, newer, published, refused, resave, run, same, tensors
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.reading import CheckpointError
from starflow2_jax.models.vlm import abstract_params
from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.sharding import abstract
from starflow2_jax.weights import convert, qwen, vlm
from starflow2_jax.weights.qwen import QWEN2_5_VL
from starflow2_jax.weights.table import expected, source_shape

ROOT = Path(__file__).parents[2]


MODELS = {
    "bfloat16": {},
    "tied, float32": dict(tied=True, dtype=torch.float32, num_hidden_layers=3, num_attention_heads=3),
    "float16, one file": dict(dtype=torch.float16, shard="1GB", num_key_value_heads=3),
    "two types": dict(vision_dtype=torch.float32),
}


@pytest.mark.parametrize("names", ["older", "newer"])
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(tmp_path, model, names):
    source = make(tmp_path / "hf", **MODELS[model])
    original = tensors(source)
    assert (source / INDEX).is_file() == ("one file" not in model)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype="auto").state_dict()
    if names == "newer":
        resave(source, newer)
        assert "model.visual.merger.ln_q.weight" in tensors(source) and "visual.merger.ln_q.weight" in original
    run("--from", source, "--to", tmp_path / "checkpoint")
    run("--from", tmp_path / "checkpoint", "--to-hf", tmp_path / "back", "--shard-gb", "0.00006")
    same(tensors(tmp_path / "back"), original)
    if model != "two types":  # the reference library loads all of it in one type
        same(Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back", dtype="auto").state_dict(), loaded)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert len(files) > 2 and set(index["weight_map"]) == set(original)
    assert index["metadata"]["total_size"] == sum(bits(value).size for value in original.values())
    largest = max(bits(value).size for value in original.values())
    assert all(file.stat().st_size < max(largest, 60_000) + 10_000 for file in files)
    for name in ("config.json", "preprocessor_config.json", *STAND_INS):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_known_numbers(reference, checkpoint):
    """A few tensors against indices worked out by hand: H = 3 heads of K = 16, in the vision tower 2 of 16."""
    cfg = vlm.load_config(checkpoint / "vlm.json")
    saved = CheckpointDirectory(checkpoint).frozen.restore(on_mesh(cfg, jnp.bfloat16, 1, 8, 1))["vlm"]
    ours = jax.tree.map(lambda x: np.asarray(x, np.float32), saved)
    theirs = {name: value.float().numpy() for name, value in tensors(reference).items()}
    layers, block = ours["stack"]["layers"], ours["vision"]["stack"]["layers"]
    q, o = theirs["model.layers.1.self_attn.q_proj.weight"], theirs["model.layers.1.self_attn.o_proj.weight"]
    assert layers["attention"]["query"]["kernel"].shape == (2, 48, 3, 16)
    assert layers["attention"]["query"]["kernel"][1, 7, 2, 5] == q[2 * 16 + 5, 7]
    assert layers["attention"]["query"]["bias"][1, 2, 5] == theirs["model.layers.1.self_attn.q_proj.bias"][37]
    assert layers["attention"]["out"]["kernel"][1, 2, 5, 7] == o[7, 2 * 16 + 5]
    assert layers["mlp"]["down"]["kernel"][0, 70, 3] == theirs["model.layers.0.mlp.down_proj.weight"][3, 70]
    assert layers["mlp"]["gate"]["kernel"][0, 3, 70] == theirs["model.layers.0.mlp.gate_proj.weight"][70, 3]
    norm = theirs["model.layers.1.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(layers["mlp_norm"]["scale"][1], norm)
    np.testing.assert_array_equal(ours["token_embedding"]["embedding"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(ours["lm_head"]["embedding"], theirs["lm_head.weight"])
    qkv = theirs["visual.blocks.2.attn.qkv.weight"]
    for i, name in enumerate(("query", "key", "value")):
        assert block["attention"][name]["kernel"][2, 31, 1, 9] == qkv[32 * i + 16 * 1 + 9, 31]
    patch = theirs["visual.patch_embed.proj.weight"]  # (32, 3, 2, 4, 4): channel, time, row, column
    assert ours["vision"]["patch_embedding"]["kernel"][2 * 32 + 1 * 16 + 3 * 4 + 2, 11] == patch[11, 2, 1, 3, 2]
    assert ours["vision"]["merge_in"]["kernel"][100, 3] == theirs["visual.merger.mlp.0.weight"][3, 100]


def test_the_processors_options_travel(checkpoint):
    vision = vlm.load_config(checkpoint / "vlm.json").vision
    assert (vision.min_pixels, vision.max_pixels) == (64, 4096)
    assert (vision.mean, vision.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))


def on_mesh(cfg, dtype, *sizes) -> dict:
    shapes = abstract(abstract_params(cfg), sharding.make_mesh(*sizes))
    return jax.tree.map(lambda x: x.update(dtype=dtype), shapes)


def test_it_restores_on_any_mesh(checkpoint):
    """With plain orbax; and with the content hash checked, in the type it was saved in whatever type is asked for."""
    cfg = vlm.load_config(checkpoint / "vlm.json")
    assert set(abstract_params(cfg)) == {"vlm"} and cfg.dtype == "bfloat16"
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(checkpoint / "frozen", on_mesh(cfg, jnp.bfloat16, 2, 2, 2))
    up = plain["vlm"]["stack"]["layers"]["mlp"]["up"]["kernel"]
    assert up.dtype == jnp.bfloat16 and up.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 24, 36)}
    wide = CheckpointDirectory(checkpoint).frozen.restore(on_mesh(cfg, jnp.float32, 1, 8, 1))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(wide), strict=True):
        assert b.dtype == a.dtype == jnp.bfloat16 and isinstance(b.sharding, NamedSharding)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_changed_checkpoint_is_noticed(checkpoint, tmp_path, capsys):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    cfg = vlm.load_config(folder / "vlm.json")
    chunk = folder / "frozen" / "vlm.stack.layers.mlp.down.kernel" / "1.0.0"
    data = bytearray(chunk.read_bytes())
    data[501] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match="content hash differs"):
        CheckpointDirectory(folder).frozen.restore(on_mesh(cfg, jnp.bfloat16, 1, 8, 1))
    refused(capsys, folder, "damaged (content hash differs)", to="--to-hf")
    chunk.write_bytes(data[:100])
    refused(capsys, folder, "vlm/stack/layers/mlp/down/kernel cannot be read", to="--to-hf")
    chunk.unlink()
    refused(capsys, folder, "damaged (content hash differs)", to="--to-hf")
    shutil.rmtree(chunk.parent)
    refused(capsys, folder, "incomplete or damaged", to="--to-hf")
    (folder / "vlm.json").write_text('{"layers": 3}')
    refused(capsys, folder, "vlm.json is damaged", to="--to-hf")
    refused(capsys, folder / "none", "there is no f", to="--to-hf")


# Full size, without memory.


@pytest.mark.parametrize("size", QWEN2_5_VL)
def test_full_size(tmp_path, size):
    """Names, shapes and counts of the real models, against the reference on the meta device."""
    (tmp_path / "config.json").write_text(json.dumps(published(size)))
    cfg = qwen.read_config(tmp_path / "config.json", "bfloat16")
    assert cfg == QWEN2_5_VL[size]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(published(size)))
    model.tie_weights()
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tree = abstract_params(cfg)
    wanted, faults = expected(qwen.table(cfg, theirs), tree)
    assert not faults and {name: source_shape(*w) for name, w in wanted.items()} == theirs
    vision = sum(x.size for x in jax.tree.leaves(tree["vlm"].pop("vision")))
    text = sum(x.size for x in jax.tree.leaves(tree))
    assert text + vision == sum(value.numel() for value in model.parameters())
    if size == "7b":
        assert (round(text / 1e9, 3), round(vision / 1e9, 3)) == (7.616, 0.677)


def test_what_a_config_leaves_out_is_the_references_default(tmp_path):
    path, values = tmp_path / "config.json", published("7b")
    for name in ("rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        del values[name]
    values |= {"hidden_size": 2048, "num_attention_heads": 16}  # which the default of 8 key/value heads divides
    values["vision_config"] = {"hidden_size": 1280, "out_hidden_size": 2048}
    path.write_text(json.dumps(values))
    cfg, theirs = qwen.read_config(path, "float32"), Qwen2_5_VLConfig.from_dict(values)
    assert (cfg.norm_eps, cfg.kv_heads, cfg.tied_head) == (1e-5, theirs.text_config.num_key_value_heads, False)
    assert (cfg.vision.layers, cfg.vision.window, cfg.vision.dtype) == (32, 112, "float32")
    vlm.write_config(tmp_path / "vlm.json", cfg)
    assert vlm.load_config(tmp_path / "vlm.json") == cfg
    with pytest.raises(TypeError):  # every field is there, whatever defaults the class may have
        type(cfg)()
    assert set(json.loads((tmp_path / "vlm.json").read_text())) == {f for f in cfg.__dataclass_fields__}


# Memory and dependencies.


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """NumPy's share of it, at its peak, for a model thrice as large; the whole is in docs/benchmarks/convert.md."""
    source = make(tmp_path / "hf", dtype=torch.float32, shard="1GB", vocab_size=2**18, num_hidden_layers=1)
    largest = 2**18 * 48 * 4
    assert (source / "model.safetensors").stat().st_size > 1.9 * largest > 90e6
    for call in (
        lambda: convert.to_checkpoint("qwen2_5_vl", source, tmp_path / "checkpoint"),
        lambda: convert.to_reference("qwen2_5_vl", tmp_path / "checkpoint", tmp_path / "back"),
    ):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert largest < peak < 1.9 * largest


def test_without_torch(reference, tmp_path):
    """The command in a process of its own, where PyTorch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from starflow2_jax import cli; sys.exit(cli.main())"
    arguments = ["convert", "qwen2_5_vl", "--from", str(reference), "--to", str(tmp_path / "checkpoint")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path / 'checkpoint'}\n"
