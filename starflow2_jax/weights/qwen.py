"""Qwen2.5-VL's checkpoints as our VLM: its options -> QwenConfig, its tensors <-> our parameters."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from starflow2_jax.fields import build
from starflow2_jax.models.qwen import Qwen, QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.sequence import VisionInput
from starflow2_jax.weights.table import Rule, WeightError, from_heads, linear, norm, to_heads


def _published(vision_hidden: int = 3420, **text) -> QwenConfig:
    vision = VisionConfig(
        layers=32, width=1280, heads=16, mlp_hidden=vision_hidden, out_width=text["width"], dtype="bfloat16"
    )
    return QwenConfig(head_dim=128, vision=vision, dtype="bfloat16", **text)


QWEN2_5_VL = {
    "3b": _published(
        vocabulary=151936, layers=36, width=2048, heads=16, kv_heads=2, mlp_hidden=11008, tied_head=True
    ),
    "7b": _published(vocabulary=152064, layers=28, width=3584, heads=28, kv_heads=4, mlp_hidden=18944),
    "32b": _published(
        vocabulary=152064, layers=64, width=5120, heads=40, kv_heads=8, mlp_hidden=27648, vision_hidden=3456
    ),
}  # fmt: skip
OLDER, NEWER = ("model.", "visual."), ("model.language_model.", "model.visual.")  # how names of text and vision begin
STACK, HEADS = "stack/layers/", ("query", "key", "value")


def read_config(path: Path, dtype: str) -> QwenConfig:
    """The reference's config.json -> ours, computing in `dtype`; what the file leaves out is the reference's default.

    Raises WeightError where the file is unreadable or asks for what we do not have.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2_5_VLConfig

    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or values.get("model_type") != "qwen2_5_vl":
            raise WeightError(f"{path} describes no Qwen2.5-VL: its model_type is not qwen2_5_vl")
        reference = Qwen2_5_VLConfig.from_dict(values)
        text, vision = reference.text_config, reference.vision_config
        _refuse_unsupported(path, text, vision)
        tower = VisionConfig(
            layers=vision.depth, width=vision.hidden_size, heads=vision.num_heads, mlp_hidden=vision.intermediate_size,
            out_width=vision.out_hidden_size, patch=vision.patch_size, merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size, channels=vision.in_channels, window=vision.window_size,
            full_attention_layers=tuple(vision.fullatt_block_indexes),
            rotary_theta=float(vision.rope_parameters["rope_theta"]), dtype=dtype,
        )  # fmt: skip
        return QwenConfig(
            vocabulary=text.vocab_size, layers=text.num_hidden_layers, width=text.hidden_size,
            heads=text.num_attention_heads, kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads, mlp_hidden=text.intermediate_size,
            rotary_theta=float(text.rope_parameters["rope_theta"]),
            rotary_sections=tuple(text.rope_parameters["mrope_section"]), norm_eps=text.rms_norm_eps,
            tied_head=reference.tie_word_embeddings, embedding_std=text.initializer_range, vision=tower, dtype=dtype,
        )  # fmt: skip
    except FileNotFoundError:
        raise WeightError(f"{path.parent} holds no config.json") from None
    except KeyError as error:
        raise WeightError(f"{path} lacks the option {error.args[0]}") from None
    except (OSError, TypeError, AttributeError, ValueError, StrictDataclassError) as error:
        if isinstance(error, WeightError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise WeightError(f"{path} cannot be read as Qwen2.5-VL's options: {reason}") from None


def read_processor(path: Path, vision: VisionConfig) -> VisionConfig:
    """`vision` with the sizes and normalisation of the reference's preprocessor_config.json, where there is one."""
    if not path.is_file():
        return vision
    try:
        values = json.loads(path.read_text())
        size = values.get("size") or {}
        for name, have in (("patch_size", vision.patch), ("merge_size", vision.merge)):
            if values.get(name, have) != have:
                raise WeightError(f"{path} has {name} {values[name]} where config.json has {have}")
        return dataclasses.replace(
            vision,
            min_pixels=int(values.get("min_pixels") or size.get("shortest_edge") or vision.min_pixels),
            max_pixels=int(values.get("max_pixels") or size.get("longest_edge") or vision.max_pixels),
            mean=tuple(map(float, values.get("image_mean") or vision.mean)),
            std=tuple(map(float, values.get("image_std") or vision.std)),
        )
    except (OSError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, WeightError):
            raise
        raise WeightError(
            f"{path} cannot be read as a processor's options: {' '.join(str(error).split())[:200]}"
        ) from None


def _refuse_unsupported(path: Path, text, vision) -> None:
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
        raise WeightError(f"{path} asks for what is not supported: {', '.join(faults)}")


def write_config(path: Path, cfg: QwenConfig) -> None:
    """Our config as JSON, every field."""
    path.write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")


def load_config(path: Path) -> QwenConfig:
    """What `write_config` wrote. Raises WeightError."""
    try:
        return build(QwenConfig, json.loads(path.read_text()))
    except FileNotFoundError:
        raise WeightError(f"{path.parent} is no converted VLM: it has no {path.name}") from None
    except (OSError, ValueError, TypeError) as error:
        raise WeightError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); convert again") from None


def abstract_params(cfg: QwenConfig) -> dict:
    """Shapes and types of Pretzel's group `vlm`: {"vlm": {...}}."""
    ids = jnp.zeros((1, 1), jnp.int32)
    v = cfg.vision
    patches = jnp.zeros((1, v.merge**2, v.patch_width)) if v else None
    index = jnp.zeros((1, v.merge**2), jnp.int32) if v else None

    def every_part(m: Qwen):
        if v:
            m.see(VisionInput(patches, jnp.stack([index, index], -1), index, index))
        return m.logits(m(m.embed(ids), jnp.zeros((1, 1, 3), jnp.int32), jnp.ones((1, 1, 1), bool))[0])

    return {"vlm": jax.eval_shape(lambda: Qwen(cfg).init(jax.random.key(0), method=every_part))["params"]}


def table(cfg: QwenConfig, names: tuple[str, str] = OLDER) -> tuple[Rule, ...]:
    """The rules for `abstract_params(cfg)`; `names`: OLDER (what the reference library saves) or NEWER."""
    text, vision = names
    rules = (
        Rule(text + "embed_tokens.weight", "vlm/token_embedding/embedding"),
        Rule(text + "norm.weight", "vlm/norm/scale"),
        *_layer(text + "layers.{layer}.", "vlm/" + STACK, ("input_layernorm", "post_attention_layernorm")),
        *(
            r
            for n in HEADS
            for r in to_heads(f"{text}layers.{{layer}}.self_attn.{n[0]}_proj", f"vlm/{STACK}attention/{n}")
        ),
        *from_heads(text + "layers.{layer}.self_attn.o_proj", f"vlm/{STACK}attention/out", bias=False),
    )
    if not cfg.tied_head:
        rules += (Rule("lm_head.weight", "vlm/lm_head/embedding"),)
    return rules + (_vision(cfg.vision, vision) if cfg.vision else ())


def _layer(source: str, target: str, norms: tuple[str, str], bias: bool = False) -> tuple[Rule, ...]:
    """Norms and gated MLP of a layer."""
    return (
        *norm(source + norms[0], target + "attention_norm", bias=False),
        *norm(source + norms[1], target + "mlp_norm", bias=False),
        *(r for m in ("gate", "up", "down") for r in linear(f"{source}mlp.{m}_proj", f"{target}mlp/{m}", bias)),
    )


def _vision(v: VisionConfig, source: str) -> tuple[Rule, ...]:
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


def generation(names: Mapping[str, object]) -> tuple[str, str]:
    """OLDER or NEWER: how these tensors are named."""
    return NEWER if any(name.startswith(NEWER) for name in names) else OLDER
