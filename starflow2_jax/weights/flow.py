"""TarFlow's and STARFlow's checkpoints: their options become our blocks, and their tensors our parameters."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models.flow import Context, Flow, FlowBlockConfig, alternating
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.weights.table import (
    NEIGHBOURS,
    Ignore,
    Rule,
    WeightError,
    from_heads,
    import_tensors,
    linear,
    norm,
    to_heads,
)

LAYER, STACK = "blocks.{block}.attn_blocks.{layer}.", "block_{block}/stack/layers/"
QKV = tuple(f"{STACK}attention/{name}" for name in ("query", "key", "value"))

BLOCK = (
    *linear("blocks.{block}.proj_in", "block_{block}/proj_in"),
    *linear("blocks.{block}.proj_out", "block_{block}/proj_out"),
    Rule("blocks.{block}.pos_embed", "block_{block}/position_embedding"),
    *norm(LAYER + "attention.norm", STACK + "attention_norm"),
    *norm(LAYER + "mlp.norm", STACK + "mlp_norm"),
)
PLAIN_MLP = (*linear(LAYER + "mlp.main.0", STACK + "mlp/up"), *linear(LAYER + "mlp.main.2", STACK + "mlp/down"))
GATED_MLP = tuple(r for m in ("gate", "up", "down") for r in linear(f"{LAYER}mlp.{m}_proj", f"{STACK}mlp/{m}"))

TARFLOW = (
    *BLOCK,
    *to_heads(LAYER + "attention.qkv", QKV),
    *from_heads(LAYER + "attention.proj", STACK + "attention/out"),
    *PLAIN_MLP,
    Rule("blocks.{block}.class_embed", "block_{block}/class_embedding", "c 1 e -> c e"),
    Ignore(r"var|blocks\.\d+\.attn_mask"),
)
STARFLOW = (
    *BLOCK,
    *to_heads(LAYER + "attention.qkv", QKV, head=NEIGHBOURS),
    *from_heads(LAYER + "attention.proj", STACK + "attention/out", head=NEIGHBOURS),
    Rule("blocks.{block}.sos_embed", "block_{block}/start_token", "1 1 d -> d"),
    *linear("blocks.{block}.proj_txt", "block_{block}/proj_prefix"),
    *norm("blocks.{block}.final_norm", "block_{block}/norm"),
    *norm(LAYER + "attention.query_norm", STACK + "attention/query_norm", head=NEIGHBOURS),
    *norm(LAYER + "attention.key_norm", STACK + "attention/key_norm", head=NEIGHBOURS),
    *norm(LAYER + "attention.post_norm", STACK + "attention_post_norm"),
    *norm(LAYER + "mlp.post_norm", STACK + "mlp_post_norm"),
    Ignore(r"var|blocks\.\d+\.attn_mask|feat_rope\.freqs_(cos|sin)"),
)
TABLES = {  # model, gated MLP
    ("tarflow", False): TARFLOW,
    ("starflow", False): STARFLOW + PLAIN_MLP,
    ("starflow", True): STARFLOW + GATED_MLP,
}

# Defaults of options. An option that is null counts as absent.
TARFLOW_DEFAULTS = {"head_dim": 64, "expansion": 4, "num_classes": 0}
STARFLOW_DEFAULTS = {
    "head_dim": 64,
    "num_heads": 0,
    "num_kv_heads": 0,
    "expansion": 4,
    "txt_size": 0,
    "txt_dim": 0,
    "rope": False,
    "sos": False,
    "use_softplus": False,
    "soft_clip": 0,
    "use_final_norm": False,
    "norm_type": "layer_norm",
    "use_qk_norm": False,
    "use_post_norm": False,
    "use_bias": True,
    "use_swiglu": False,
    "cond_top_only": False,
    "seq_order": "R2L",
}
# Options that are supported with this value only.
ONLY = {
    "nvp": True,
    "patch_size": 1,
    "hf_style_rope": False,
    "use_mm_attn": False,
    "use_proj_txt": True,
    "use_pretrained_lm": None,
    "temporal_causal": 0,
    "local_attn_window": None,
    "top_block_channels": None,
}


def _options(config: Mapping, required: tuple[str, ...], defaults: Mapping, only: tuple[str, ...]) -> dict:
    """`config` without nulls and with defaults. Raises WeightError for missing options and unsupported values."""
    given = {name: value for name, value in config.items() if value is not None}
    faults = [f"option {name} is missing" for name in required if name not in given]
    faults += [f"{n} = {given[n]!r} is not supported" for n in only if n in given and given[n] != ONLY[n]]
    if faults:
        raise WeightError(f"the flow's options do not fit: {'; '.join(faults)}")
    return {**defaults, **given}


def _depths(layers: int | list[int], count: int) -> list[int]:
    """The number of layers of each of `count` blocks. `layers`: one number for all, or one for each. Raises
    WeightError.
    """
    layers = [layers] if isinstance(layers, int) else list(layers)
    layers = layers * count if len(layers) == 1 else layers
    if len(layers) != count or min(layers) < 1:
        raise WeightError(f"the flow's options do not fit: layers_per_block is {layers}, but there are {count} blocks")
    return layers


def tarflow_blocks(config: Mapping) -> tuple[FlowBlockConfig, ...]:
    """TarFlow's options (the arguments of the reference's model) -> our blocks over patches of pixels.

    Raises WeightError for options that are missing or not supported.
    """
    required = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block")
    c = _options(config, required, TARFLOW_DEFAULTS, ("nvp",))
    depths, side = _depths(c["layers_per_block"], c["num_blocks"]), c["img_size"] // c["patch_size"]
    transformer = TransformerConfig(
        layers=depths[0],
        width=c["channels"],
        heads=c["channels"] // c["head_dim"],
        head_dim=c["head_dim"],
        mlp_hidden=int(c["channels"] * c["expansion"]),
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    block = FlowBlockConfig(
        (side, side),
        c["in_channels"] * c["patch_size"] ** 2,
        transformer,
        start="shift",
        scale="exp",
        positions="learned",
        classes=c["num_classes"],
    )
    return _with_depths(alternating(block, len(depths)), depths)


def starflow_blocks(config: Mapping) -> tuple[FlowBlockConfig, ...]:
    """STARFlow's options (the arguments of the reference's model, and `latent_size`, the grid's side) -> our blocks.

    Raises WeightError for options that are missing or not supported.
    """
    required = ("in_channels", "latent_size", "channels", "layers_per_block")
    c = _options(config, required, STARFLOW_DEFAULTS, tuple(n for n in ONLY if n != "nvp"))
    layers = c["layers_per_block"]
    depths = _depths(layers, c.get("num_blocks") or len(layers))
    layer_norm, side = c["norm_type"] == "layer_norm", c["latent_size"]
    transformer = TransformerConfig(
        layers=depths[0],
        width=c["channels"],
        heads=c["num_heads"] or c["channels"] // c["head_dim"],
        kv_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
        mlp_hidden=int(c["channels"] * c["expansion"]),
        norm="layer" if layer_norm else "rms_zero",
        norm_eps=1e-5 if layer_norm else 1e-6,
        activation="gelu_tanh" if c["use_swiglu"] else "gelu",
        gated_mlp=c["use_swiglu"],
        qkv_bias=c["use_bias"],
        out_bias=c["use_bias"],
        mlp_bias=c["use_bias"],
        qk_norm="rms_zero" if c["use_qk_norm"] else "none",
        post_norm=c["use_post_norm"],
    )
    block = FlowBlockConfig(
        (side, side),
        c["in_channels"],
        transformer,
        start="token" if c["sos"] else "shift",
        scale="softplus" if c["use_softplus"] else "exp",
        soft_clip=float(c["soft_clip"]),
        positions="rotary" if c["rope"] else "learned",
        rotary_text=c["txt_size"] > 0,
        rotary_side=float(c.get("pt_seq_len", side)),
        final_norm=c["use_final_norm"],
        prefix_channels=c["txt_dim"],
    )
    blocks = _with_depths(alternating(block, len(depths), flip_odd=c["seq_order"] == "R2L"), depths)
    if c["cond_top_only"]:
        blocks = (*(replace(b, prefix_channels=0) for b in blocks[:-1]), blocks[-1])
    return blocks


def _with_depths(blocks: tuple[FlowBlockConfig, ...], depths: list[int]) -> tuple[FlowBlockConfig, ...]:
    """The blocks with these numbers of layers."""
    return tuple(
        replace(block, transformer=replace(block.transformer, layers=layers))
        for block, layers in zip(blocks, depths, strict=True)
    )


def abstract_params(blocks: tuple[FlowBlockConfig, ...]) -> dict:
    """Shapes and types of the parameters of Flow(blocks)."""
    (h, w), channels = blocks[0].grid, blocks[0].channels
    text = max(block.prefix_channels for block in blocks)
    context = Context(prefix=jnp.zeros((1, 1, text)) if text else None)
    init = partial(Flow(blocks).init, h=jnp.zeros((1, h * w, channels)), context=context)
    return jax.eval_shape(init, jax.random.key(0))["params"]


def import_flow(tensors: Mapping[str, np.ndarray], config: Mapping) -> tuple[tuple[FlowBlockConfig, ...], dict]:
    """A reference model's tensors and options -> our blocks, and the parameters of Flow(blocks) as NumPy arrays.

    config["model"] is "tarflow" or "starflow". Raises WeightError.
    """
    model = config.get("model")
    if model not in ("tarflow", "starflow"):
        raise WeightError(f"the flow's options name the model {model!r}; known are tarflow and starflow")
    if model == "tarflow" and "var" in tensors and not np.all(tensors["var"] == 1):
        raise WeightError("tensor var, the variance of the prior, is not 1 everywhere, which is not supported")
    blocks = tarflow_blocks(config) if model == "tarflow" else starflow_blocks(config)
    table = TABLES[model, blocks[0].transformer.gated_mlp]
    return blocks, import_tensors(table, tensors, abstract_params(blocks))
