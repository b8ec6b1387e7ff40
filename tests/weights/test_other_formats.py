"""Folders that hold no plain safetensors model: each is told by what it is and what to do, before anything is
written.
"""

import shutil
from pathlib import Path

import pytest
import torch
from reference_qwen import edit, refused, resave, run


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "hf"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def quantised(tensors: dict, how: str) -> dict:
    """The tensors as three libraries quantise them: their names, types and shapes."""
    out = {}
    for name, value in tensors.items():
        base = name.removesuffix("weight")
        if not name.startswith("model.layers.") or not name.endswith("_proj.weight"):
            out[name] = value
        elif how == "awq":
            out[base + "qweight"] = torch.zeros(value.shape[1], 8, dtype=torch.int32)
            out[base + "scales"] = torch.ones(1, value.shape[0], dtype=torch.float16)
        elif how == "compressed-tensors":
            out[name] = value.to(torch.float8_e4m3fn)
            out[base + "weight_scale"] = torch.ones(value.shape[0], 1)
        elif how == "bitsandbytes":
            out[name] = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8)
            out[name + ".absmax"] = torch.ones(4)
        else:  # kept as plain numbers of other shapes
            out[name] = value[:1]
    return out


@pytest.mark.parametrize("how", ["awq", "compressed-tensors", "bitsandbytes", "other"])
@pytest.mark.parametrize("said", [True, False])
def test_quantised_weights(copy, capsys, how, said):
    resave(copy, lambda tensors: quantised(tensors, how))
    if said:
        edit(copy, "config.json", lambda c: c.update(quantization_config=dict(quant_method=how, bits=4)))
    elif how == "other":
        return
    message = refused(
        capsys, copy, "quantised", how if said else "types", "the folder of the unquantised model", str(copy)
    )
    assert message.count("\n") == 1


def test_settings_of_a_quantiser_beside_plain_weights(copy):
    """Weights that were made plain again are converted, whatever the config still names."""
    edit(copy, "config.json", lambda c: c.update(quantization_config=dict(quant_method="fp8")))
    run("--from", copy, "--to", copy.parent / "plain")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "files, saying",
    [
        ({}, ("is empty",)),
        ({"notes.txt": b"", "config.json": b"{}"}, ("holds neither", "it holds config.json, notes.txt")),
        ({"adapter_config.json": b'{"base_model_name_or_path": "a/b"}', "adapter_model.safetensors": b""}, ("a LoRA adapter of a/b", "merge")),
        ({"adapter_model.bin": b""}, ("a LoRA adapter of another model", "merge")),
        ({"pytorch_model.bin": b"", "config.json": b"{}"}, ("pickles of PyTorch (pytorch_model.bin)", "safe_serialization=True")),
        ({f"pytorch_model-{i:05d}-of-00009.bin": b"" for i in range(9)}, ("and 6 more", "safe_serialization=True")),
        ({"q4.gguf": b"GGUF"}, ("GGUF", "quantised", "unquantised safetensors model")),
        ({"config.json": b'{"quantization_config": {"quant_method": "torchao"}}', "a.bin": b""}, ("quantised", "torchao", "unquantised")),
        ({"snapshots/ab12/config.json": b"{}", "refs/main": b"ab12"}, ("cache of the Hugging Face hub", "the snapshot", "snapshots/ab12")),
        ({f"models--a--{i}/snapshots/ab/config.json": b"{}" for i in range(2)}, ("cache of the Hugging Face hub", "one of its 2 snapshots")),
        ({"model.safetensors": POINTER, "config.json": b"{}"}, ("model.safetensors in", "Git LFS pointers", "git lfs pull")),
        ({f"model-{i}.safetensors": POINTER for i in range(9)}, ("and 6 more", "Git LFS pointers")),
        ({"tokenizer.json": POINTER, "model.safetensors": b""}, ("tokenizer.json in", "Git LFS pointers")),
        ({"model-00001-of-00002.safetensors": b""}, ("fetch the index",)),
        ({"vlm.json": b"{}"}, ("a checkpoint that `starflow2 convert` made", "--to-hf")),
    ],
    ids=lambda value: next(iter(value), "empty") if isinstance(value, dict) else "",
)  # fmt: skip
def test_folders_of_other_formats(tmp_path, capsys, files, saying):
    folder = tmp_path / "given"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    message = refused(capsys, folder, str(folder), *saying)
    assert message.count("\n") == 1 and len(message) < 600


def test_a_file_instead_of_a_folder(copy, capsys):
    refused(capsys, shard(copy), "is a file; give the folder that holds it")
    (copy / "q4.gguf").write_bytes(b"GGUF")
    refused(capsys, copy / "q4.gguf", "GGUF", "unquantised")


def test_files_that_are_no_safetensors(copy, capsys):
    for begin, saying in (
        (b"GGUF\3\0\0\0", "quantised"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"abcd", "fetch it again"),
    ):
        shard(copy).write_bytes(begin + bytes(5000))
        refused(capsys, copy, f"{shard(copy)} cannot be read", saying)
    for zipped in (True, False):
        torch.save({"w": torch.ones(3)}, shard(copy), _use_new_zipfile_serialization=zipped)
        refused(capsys, copy, f"{shard(copy)} cannot be read", "a pickle of PyTorch", "safe_serialization=True")
