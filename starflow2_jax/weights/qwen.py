"""Qwen2.5-VL's checkpoints: config.json becomes a QwenConfig, and a weight table maps tensors to our parameters."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.text_files import read_json_file, reason, shorten
from starflow2_jax.weights.qwen_processor import read_processor
from starflow2_jax.weights.table import Rule, WeightError, from_heads, linear, norm, to_heads


def _published(vision_hidden: int = 3420, **text) -> QwenConfig:
    """A published size, by the options in which sizes differ."""
    vision = VisionConfig(
        layers=32, width=1280, heads=16, mlp_hidden=vision_hidden, out_width=text["width"], dtype="bfloat16"
    )
    return QwenConfig(head_dim=128, vision=vision, dtype="bfloat16", **text)


QWEN2_5_VL = {
    "3b": _published(vocabulary=151936, layers=36, width=2048, heads=16, kv_heads=2, mlp_hidden=11008, tied_head=True),
    "7b": _published(vocabulary=152064, layers=28, width=3584, heads=28, kv_heads=4, mlp_hidden=18944),
    "32b": _published(
        vocabulary=152064, layers=64, width=5120, heads=40, kv_heads=8, mlp_hidden=27648, vision_hidden=3456
    ),
}
# Prefixes of the names of text and vision tensors. The reference library saves OLDER and reads both.
OLDER, NEWER = ("model.", "visual."), ("model.language_model.", "model.visual.")
EMBEDDING, HEAD = "vlm/token_embedding/embedding", "lm_head.weight"
LAYERS, MOST_LAYERS = ("num_hidden_layers", "depth"), 10**4  # the reference library makes a list of the layers
STACK, HEADS = "stack/layers/", ("query", "key", "value")


def read_folder(folder: Path, dtype: str) -> QwenConfig:
    """The reference's config.json and settings of its image processor -> our config that computes in `dtype`.

    Warns on stderr if the folder lacks settings of the processor, for which defaults are used. Raises WeightError.
    """
    cfg = read_config(folder / "config.json", dtype)
    if cfg.vision is None:
        return cfg
    return dataclasses.replace(cfg, vision=read_processor(folder, cfg.vision))


def read_config(path: Path, dtype: str) -> QwenConfig:
    """The reference's config.json -> our config that computes in `dtype`.

    An option that the file leaves out has the reference's default. Raises WeightError for a file that cannot be read,
    or has options that we do not support.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2_5_VLConfig

    if not path.is_file():
        raise WeightError(f"{path.parent} holds no config.json")
    values = read_json_file(path, WeightError)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "qwen2_5_vl":
        raise WeightError(
            f"{path} describes no Qwen2.5-VL: its model_type is {shorten(repr(kind), 60)}, not 'qwen2_5_vl'; give a "
            f"folder of that model"
        )
    for part in (values, values.get("text_config"), values.get("vision_config")):
        for name in LAYERS:
            if isinstance(part, dict) and isinstance(given := part.get(name), int) and given > MOST_LAYERS:
                raise WeightError(f"{path} has {name} = {shorten(given, 20)}, more than {MOST_LAYERS}; fetch it again")
    try:
        reference: Any = Qwen2_5_VLConfig.from_dict(values)
        text, vision = reference.text_config, reference.vision_config
        _refuse_unsupported(path, text, vision)
        tower = VisionConfig(
            layers=vision.depth,
            width=vision.hidden_size,
            heads=vision.num_heads,
            mlp_hidden=vision.intermediate_size,
            out_width=vision.out_hidden_size,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            channels=vision.in_channels,
            window=vision.window_size,
            full_attention_layers=tuple(vision.fullatt_block_indexes),
            rotary_theta=float(vision.rope_parameters["rope_theta"]),
            dtype=dtype,
        )
        return QwenConfig(
            vocabulary=text.vocab_size,
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            mlp_hidden=text.intermediate_size,
            rotary_theta=float(text.rope_parameters["rope_theta"]),
            rotary_sections=tuple(text.rope_parameters["mrope_section"]),
            norm_eps=text.rms_norm_eps,
            tied_head=reference.tie_word_embeddings,
            embedding_std=text.initializer_range,
            vision=tower,
            dtype=dtype,
        )
    except KeyError as error:
        raise WeightError(f"{path} lacks the option {error.args[0]}") from None
    except (OSError, TypeError, AttributeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        if isinstance(error, WeightError):
            raise
        raise WeightError(f"{path} cannot be read as Qwen2.5-VL's options: {reason(error)}") from None


def _refuse_unsupported(path: Path, text: Any, vision: Any) -> None:
    """Raises WeightError for options of the text decoder and vision tower that we do not support."""
    rotary = text.rope_parameters.get("rope_type", "default")
    found = {
        "text hidden_act": (text.hidden_act, "silu"),
        "vision hidden_act": (vision.hidden_act, "silu"),
        "text rope_type": (rotary, "default"),
        "text layer_types": (sorted(set(text.layer_types)), ["full_attention"]),
        "vision out_hidden_size": (vision.out_hidden_size, text.hidden_size),
        "text mrope_section's sum": (
            2 * sum(text.rope_parameters["mrope_section"]),
            text.hidden_size // text.num_attention_heads,
        ),
    }
    if faults := [f"{name} = {have!r}" for name, (have, want) in found.items() if have != want]:
        raise WeightError(f"{path} has options that are not supported: {', '.join(faults)}")


def table(cfg: QwenConfig, names: Collection[str] = ()) -> tuple[Rule, ...]:
    """The weight table of `abstract_params(cfg)`. `names`: the names of the folder's tensors, which decide between the
    OLDER and the NEWER prefixes; OLDER if there are none."""
    text, vision = generation(names)
    layer = text + "layers.{layer}."
    rules = (
        Rule(text + "embed_tokens.weight", EMBEDDING),
        Rule(text + "norm.weight", "vlm/norm/scale"),
        *_layer(layer, "vlm/" + STACK, ("input_layernorm", "post_attention_layernorm")),
        *(r for n in HEADS for r in to_heads(f"{layer}self_attn.{n[0]}_proj", f"vlm/{STACK}attention/{n}")),
        *from_heads(layer + "self_attn.o_proj", f"vlm/{STACK}attention/out", bias=False),
    )
    if not cfg.tied_head:
        rules += (Rule(HEAD, "vlm/lm_head/embedding"),)
    return rules + (_vision(cfg.vision, vision) if cfg.vision else ())


def copies(cfg: QwenConfig) -> dict[str, str]:
    """Tensors that a folder may hold as copies of parameters: the text head, if it is tied to the token embeddings."""
    return {HEAD: EMBEDDING} if cfg.tied_head else {}


def _layer(source: str, target: str, norms: tuple[str, str], bias: bool = False) -> tuple[Rule, ...]:
    """Rules of a layer's norms and gated MLP."""
    return (
        *norm(source + norms[0], target + "attention_norm", bias=False),
        *norm(source + norms[1], target + "mlp_norm", bias=False),
        *(r for m in ("gate", "up", "down") for r in linear(f"{source}mlp.{m}_proj", f"{target}mlp/{m}", bias)),
    )


def _vision(v: VisionConfig, source: str) -> tuple[Rule, ...]:
    """Rules of the vision tower, whose tensors' names begin with `source`."""
    target, block, stack = "vlm/vision/", source + "blocks.{layer}.", "vlm/vision/" + STACK
    sizes = {"c": v.channels, "t": v.temporal_patch, "p": v.patch, "q": v.patch}
    patches = Rule(
        source + "patch_embed.proj.weight", target + "patch_embedding/kernel", "e c t p q -> (c t p q) e", sizes
    )
    return (
        patches,
        *_layer(block, stack, ("norm1", "norm2"), bias=True),
        *to_heads(block + "attn.qkv", tuple(f"{stack}attention/{name}" for name in HEADS)),
        *from_heads(block + "attn.proj", stack + "attention/out"),
        Rule(source + "merger.ln_q.weight", target + "merge_norm/scale"),
        *linear(source + "merger.mlp.0", target + "merge_in"),
        *linear(source + "merger.mlp.2", target + "merge_out"),
    )


def generation(names: Collection[str]) -> tuple[str, str]:
    """OLDER or NEWER, whichever prefixes the names of a folder's tensors have."""
    return NEWER if any(name.startswith(NEWER) for name in names) else OLDER
