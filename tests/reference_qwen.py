"""Tiny random Qwen2.5-VL models of the reference library, saved by itself, and how tests convert them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from starflow2_jax import cli

INDEX, COMPANION = "model.safetensors.index.json", b'{"model": "\xc3\xa4"}\r\n'
STAND_INS = ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja")
VISION = dict(depth=3, hidden_size=32, intermediate_size=44, num_heads=2, out_hidden_size=48, patch_size=4,
              fullatt_block_indexes=[1], window_size=16)  # fmt: skip
TEXT = dict(vocab_size=160, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=64,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]))  # fmt: skip

PROCESSOR = dict(patch_size=VISION["patch_size"], merge_size=2, min_pixels=64, max_pixels=4096, image_mean=[0.5, 0.4, 0.3],
                 image_std=[0.3, 0.2, 0.1])  # fmt: skip


def make(folder: Path, dtype=torch.bfloat16, tied=False, vision_dtype=None, shard="60KB", **text) -> Path:
    """A random model in the reference's own format, as its library saves it; tokenizer's files are stand-ins."""
    config = Qwen2_5_VLConfig(text_config=TEXT | text, vision_config=VISION, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    if vision_dtype:
        model.model.visual.to(vision_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "additional_chat_templates").mkdir()
    for name in STAND_INS:
        (folder / name).write_bytes(COMPANION + name.encode())
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=3))
    return folder


def run(*arguments) -> None:
    assert cli.main(["convert", "qwen2_5_vl", *map(str, arguments)]) == 0


def refused(capsys, source: Path, *saying: str, to: str = "--to", code: int = 2) -> str:
    """Converting `source` is refused with a message that has all of `saying`, and leaves nothing behind."""
    before = sorted(source.parent.iterdir())
    assert cli.main(["convert", "qwen2_5_vl", "--from", str(source), to, str(source.parent / "new")]) == code
    message = capsys.readouterr().err
    assert all(word in message for word in saying), message
    assert sorted(source.parent.iterdir()) == before
    return message


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def bits(value: torch.Tensor) -> np.ndarray:
    return value.contiguous().view(-1).view(torch.uint8).numpy()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        assert (value.dtype, value.shape) == (b[name].dtype, b[name].shape), name
        np.testing.assert_array_equal(bits(value), bits(b[name]), err_msg=name)


def resave(folder: Path, change) -> None:
    """Rewrite the folder as one file of changed tensors."""
    changed = change(tensors(folder))
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink(missing_ok=True)
    save_file({name: value.contiguous().clone() for name, value in changed.items()}, folder / "model.safetensors")


def newer(given: dict) -> dict:
    """The newer names of tensors, from the older ones."""
    out = {}
    for name, value in given.items():
        new = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        out[new] = value
    return out


def edit(folder: Path, file: str, change) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(values) or values))


PUBLISHED = {  # what the published config.json say, in their flat form
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_hidden_layers=36,
               num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936, vision=(3420, 2048)),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
               num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064, vision=(3420, 3584)),
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_attention_heads=40, num_hidden_layers=64,
                num_key_value_heads=8, tie_word_embeddings=False, vocab_size=152064, vision=(3456, 5120)),
}  # fmt: skip


def published(size: str) -> dict:
    values = dict(PUBLISHED[size])
    hidden, out = values.pop("vision")
    vision = dict(depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=hidden, num_heads=16, in_chans=3,
                  out_hidden_size=out, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112,
                  fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2, temporal_patch_size=2)  # fmt: skip
    return values | dict(
        model_type="qwen2_5_vl", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False,
        sliding_window=32768, max_window_layers=28, vision_config=vision,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    )  # fmt: skip
