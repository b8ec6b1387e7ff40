"""A folder that is no sound Qwen2.5-VL is refused with its faults, and a conversion that fails leaves nothing
behind.
"""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from reference_qwen import INDEX, edit, make, newer, published, refused, resave, run, tensors
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from starflow2_jax import cli
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.weights import convert
from starflow2_jax.weights.qwen_processor import read_processor
from starflow2_jax.weights.store import ArrayStore
from starflow2_jax.weights.vlm import VLM_WEIGHTS

TOWER = VisionConfig(layers=1, width=32, heads=2, mlp_hidden=44, out_width=48, patch=4)


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "hf"))


@pytest.mark.parametrize(
    "change, saying",
    [
        (dict(model_type="llava"), "no Qwen2.5-VL"),
        (dict(hidden_act="gelu"), "text hidden_act = 'gelu'"),
        (dict(use_sliding_window=True, max_window_layers=1), "text layer_types"),
        (dict(rope_scaling=dict(type="mrope", mrope_section=[16, 24, 25])), "mrope_section"),
        (dict(rope_scaling=None), "lacks the option mrope_section"),
        (dict(hidden_size="wide"), "hidden_size"),
        (dict(vision_config=dict(out_hidden_size=7)), "vision out_hidden_size = 7"),
        (dict(vision_config=3), "vision_config"),
        (dict(num_hidden_layers=10**12), "num_hidden_layers = 1000000000000, more than 10000"),
        (dict(rope_theta=10**400), "cannot be read as Qwen2.5-VL's options"),
    ],
)
def test_a_config_that_cannot_be_used(copy, capsys, change, saying):
    (copy / "config.json").write_text(json.dumps(published("7b") | change))
    message = refused(capsys, copy, saying, str(copy / "config.json"))
    assert message.count("\n") == 1


def test_kinds(copy, checkpoint, monkeypatch, capsys):
    """An unknown kind is answered with the list; a checkpoint of one kind is not exported as another."""
    assert cli.main(["convert", "qwen2_vl", "--from", str(copy), "--to", str(copy.parent / "new")]) == 2
    said = capsys.readouterr().err
    assert "the kind of weights must be one of qwen2_5_vl, rae, not 'qwen2_vl'; did you mean 'qwen2_5_vl'?" in said
    monkeypatch.setitem(VLM_WEIGHTS, "other", VLM_WEIGHTS["qwen2_5_vl"])
    assert cli.main(["convert", "other", "--from", str(checkpoint), "--to-hf", str(copy.parent / "new")]) == 2
    assert "holds a VLM of the kind qwen2_5_vl, not other" in capsys.readouterr().err
    assert not (copy.parent / "new").exists()


@pytest.mark.parametrize(
    "content, saying",
    [
        (b"{", "is not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"patch_size": 14}', "patch_size 14, but"),
        (b'{"temporal_patch_size": 1}', "temporal_patch_size 1, but"),
        (b'{"size": 224}', "must have shortest_edge and longest_edge"),
        (b'{"patch_size": "4"}', "patch_size '4', but"),
        (b'{"max_pixels": Infinity}', "cannot be read as a processor's options"),
        (b'{"min_pixels": "many"}', "cannot be read as a processor's options"),
        (b'{"image_mean": [0.5]}', "one entry for each of the 3 channels"),
        (b'{"do_normalize": false, "resample": 2}', "not supported: do_normalize = False, resample = 2"),
        (b'{"rescale_factor": 1}', "not supported: rescale_factor = 1"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_processor_that_cannot_be_used(copy, capsys, content, saying, nested):
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (copy / "preprocessor_config.json").unlink()
    (copy / file).write_bytes(b'{"image_processor": ' + content + b"}" if nested else content)
    assert refused(capsys, copy, file, saying).count("\n") == 1


FLAT = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
NORMALISED = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1])
EDGES = dict(size=dict(shortest_edge=64, longest_edge=4096))
NULLS = dict(min_pixels=None, max_pixels=None, do_resize=True, resample=3, rescale_factor=1 / 255)


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": FLAT | NORMALISED | dict(min_pixels=64, max_pixels=4096)},
        {"preprocessor_config.json": FLAT | NORMALISED | NULLS | EDGES},
        {"preprocessor_config.json": FLAT | NORMALISED | dict(size=dict(min_pixels=64, max_pixels=4096))},
        {
            "preprocessor_config.json": NORMALISED
            | EDGES
            | dict(min_pixels=64, size=dict(shortest_edge=1, longest_edge=4096))
        },
        {
            "processor_config.json": dict(
                image_processor=FLAT | NORMALISED | NULLS | EDGES, video_processor=dict(size=3)
            )
        },
        {
            "processor_config.json": dict(image_processor=FLAT | NORMALISED | EDGES),
            "preprocessor_config.json": dict(min_pixels=1),
        },
        {
            "processor_config.json": dict(processor_class="Qwen2_5_VLProcessor"),
            "preprocessor_config.json": NORMALISED | EDGES,
        },
    ],
)
def test_forms_of_a_processors_settings(tmp_path, capsys, files):
    for name, values in files.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    cfg = read_processor(tmp_path, TOWER)
    assert (cfg.min_pixels, cfg.max_pixels) == (64, 4096)
    assert (cfg.mean, cfg.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    assert capsys.readouterr().err == ""


def test_a_processors_settings_as_the_reference_library_saves_them(tmp_path, capsys):
    processor = Qwen2VLImageProcessorPil(**FLAT, **NORMALISED, **EDGES)
    processor.save_pretrained(tmp_path)
    cfg = read_processor(tmp_path, TOWER)
    assert (cfg.min_pixels, cfg.max_pixels, cfg.mean) == (64, 4096, (0.5, 0.4, 0.3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "files, saying",
    [
        ({}, "min_pixels 3136, max_pixels 1003520, mean (0.48145466"),
        ({"preprocessor_config.json": NORMALISED | dict(min_pixels=64)}, "lacks them: max_pixels 1003520\n"),
        ({"processor_config.json": dict(image_processor=EDGES)}, "lacks them: mean (0.48145466"),
    ],
)
def test_defaults_of_a_processor_are_printed(tmp_path, capsys, files, saying):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    read_processor(tmp_path, TOWER)
    message = capsys.readouterr().err
    assert message.startswith("WARNING") and message.count("\n") == 1 and saying in message and str(tmp_path) in message


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model_type": ', b"\xff\xfe"])
def test_a_damaged_config(copy, capsys, content):
    (copy / "config.json").write_bytes(content)
    refused(capsys, copy, str(copy / "config.json"))
    (copy / "config.json").unlink()
    refused(capsys, copy, "holds no config.json")


# Folders that do not fit: each is refused before anything is written.


def test_long_lists_of_faults_are_cut(copy, capsys):
    resave(copy, lambda tensors: {"base_model." + name: value for name, value in tensors.items()})
    lines = refused(capsys, copy, "unexpected tensor base_model.", "missing tensor model.").rstrip().split("\n")
    total = int(re.search(r"\((\d+) faults\)", lines[0])[1])
    assert len(lines) == 12 and total > 100 and lines[-1] == f"- and {total - 10} more"


def test_names_shapes_and_types_all_together(copy, capsys):
    def change(t):
        t["visual.extra"] = torch.ones(2)
        del t["model.layers.1.mlp.up_proj.weight"]
        t["model.norm.weight"] = torch.ones(49, dtype=torch.bfloat16)
        patch = t["visual.patch_embed.proj.weight"]
        t["visual.patch_embed.proj.weight"] = patch.permute(0, 2, 1, 3, 4)  # as many numbers, of another meaning
        t["model.layers.1.input_layernorm.weight"] = t["model.layers.1.input_layernorm.weight"].float()
        t["lm_head.weight"] = t["lm_head.weight"].double()
        return t

    resave(copy, change)
    lines = refused(capsys, copy).rstrip().split("\n")
    assert lines[0].endswith("the weights do not fit (6 faults):")
    assert set(lines[1:]) == {
        "- unexpected tensor visual.extra (2,)",
        "- missing tensor model.layers.1.mlp.up_proj.weight, of vlm/stack/layers/mlp/up/kernel",
        "- tensor model.norm.weight has shape (49,) where (48,) is expected",
        "- tensor visual.patch_embed.proj.weight has shape (32, 2, 3, 4, 4) where (32, 3, 2, 4, 4) is expected",
        "- tensor model.layers.1.input_layernorm.weight is of type F32, model.layers.0.input_layernorm.weight of BF16; "
        "they are layers of one array",
        "- tensor lm_head.weight is of type F64; supported are F32, F16, BF16",
    }


def test_both_generations_of_names(copy, capsys):
    resave(copy, lambda t: t | newer({"visual.merger.ln_q.weight": t["visual.merger.ln_q.weight"]}))
    refused(capsys, copy, "unexpected tensor model.embed_tokens.weight", "missing tensor model.language_model.norm")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(copy, capsys, bad):
    def change(t):
        t["visual.blocks.1.mlp.gate_proj.weight"][3, 5:7] = bad
        return t

    resave(copy, change)
    refused(capsys, copy, "tensor visual.blocks.1.mlp.gate_proj.weight in", "has 2 numbers that are not finite")


def test_tied_heads(tmp_path, capsys):
    source = make(tmp_path / "hf", tied=True)
    assert "lm_head.weight" not in tensors(source)
    embedding = "model.embed_tokens.weight"
    resave(source, lambda t: t | {"lm_head.weight": t[embedding]})
    run("--from", source, "--to", tmp_path / "checkpoint")
    assert not list((tmp_path / "checkpoint" / "frozen").glob("*lm_head*"))

    def change(t):
        t["lm_head.weight"][159, 47] += 1
        return t

    resave(source, change)
    refused(capsys, source, "lm_head.weight differs from model.embed_tokens.weight")
    resave(source, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    edit(source, "config.json", lambda c: c.update(tie_word_embeddings=False))
    refused(capsys, source, "missing tensor lm_head.weight")


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def test_missing_files(copy, capsys):
    refused(capsys, copy.parent / "none", "there is no file or folder")
    name = shard(copy).name
    shard(copy).rename(copy / "elsewhere")
    refused(capsys, copy, f"{name} is missing; {INDEX} names it for")
    (copy / INDEX).unlink()
    refused(capsys, copy, f"holds neither model.safetensors nor {INDEX}")


@pytest.mark.parametrize("keep", [0, 5, 1000, -7])
def test_truncated_files(copy, capsys, keep):
    path = shard(copy)
    path.write_bytes(path.read_bytes()[:keep])
    refused(capsys, copy, f"{path} cannot be read", "fetch it again")


def test_files_that_are_too_long(copy, capsys):
    path = shard(copy)
    path.write_bytes(path.read_bytes() + bytes(64))
    refused(capsys, copy, f"{path} cannot be read")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "..", "", 3, "sub/a.safetensors"])
def test_an_index_that_points_outside(copy, capsys, name):
    edit(copy, INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(capsys, copy, f"names {name!r}, which is no file name within its folder")


def test_an_index_that_names_other_files(copy, capsys):
    edit(copy, INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "config.json"}))
    refused(capsys, copy, "'config.json', which is no .safetensors file")


@pytest.mark.parametrize(
    "content, saying",
    [
        (b"", "is not valid JSON"),
        (b"[]", "cannot be read as an index"),
        (b"{}", "cannot be read as an index"),
        (b'{"weight_map": 3}', "cannot be read as an index"),
        (b"\xff", "cannot be read as text (byte 0 is not UTF-8)"),
    ],
)
def test_a_damaged_index(copy, capsys, content, saying):
    (copy / INDEX).write_bytes(content)
    refused(capsys, copy, f"{INDEX} {saying}")


def test_an_index_that_lies(copy, capsys):
    first, second = (file.name for file in sorted(copy.glob("*.safetensors"))[:2])
    where = json.loads((copy / INDEX).read_text())["weight_map"]
    moved = next(name for name, file in where.items() if file == first)
    edit(copy, INDEX, lambda index: index["weight_map"].update({moved: second}))
    refused(capsys, copy, f"says that {second} holds {moved}, but it does not", f"{first} holds {moved}, but")


def test_two_sets_of_weights(copy, capsys):
    shutil.copyfile(shard(copy), copy / "model.safetensors")
    refused(capsys, copy, f"holds both model.safetensors and {INDEX}")


def test_what_exists_is_not_overwritten(copy, checkpoint, capsys):
    (copy.parent / "new").mkdir()
    refused(capsys, copy, "exists already")
    (copy.parent / "new/file").write_text("")
    refused(capsys, copy.parent / "new", "exists already", to="--to-hf")


def test_a_full_disk(copy, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    refused(capsys, copy, "of free space", code=74)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("back", [False, True])
def test_an_interrupted_conversion_leaves_nothing(copy, checkpoint, monkeypatch, error, back):
    """In the middle: after a few arrays are written."""
    method, count = "read" if back else "write", 0
    original = getattr(ArrayStore, method)

    def fails_later(*args):
        nonlocal count
        count += 1
        if count > 9:
            assert len(list(copy.parent.iterdir())) == 2
            raise error
        return original(*args)

    monkeypatch.setattr(ArrayStore, method, fails_later)
    there = partial(convert.to_checkpoint, "qwen2_5_vl")
    back_again = partial(convert.to_reference, "qwen2_5_vl", shard_bytes=10_000)
    with pytest.raises(error):
        back_again(checkpoint, copy.parent / "new") if back else there(copy, copy.parent / "new")
    assert count == 10 and list(copy.parent.iterdir()) == [copy]
