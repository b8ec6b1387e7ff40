"""DINOv2's checkpoints in the format of `transformers`: config.json -> DinoConfig, tensors -> our parameters."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.errors import shown
from starflow2_jax.models.dinov2 import DinoConfig, DinoEncoder
from starflow2_jax.weights.folder import FolderTensors, read_config
from starflow2_jax.weights.table import (
    Ignore,
    Rule,
    Table,
    WeightError,
    from_heads,
    import_tensors,
    linear,
    norm,
    to_heads,
)

LAYER, STACK = "encoder.layer.{layer}.", "stack/layers/"


ENCODER = (
    Rule("embeddings.cls_token", "class_token", "1 1 e -> e"),
    Rule("embeddings.register_tokens", "registers", "1 r e -> r e"),
    Rule("embeddings.position_embeddings", "position_embedding", "1 n e -> n e"),
    Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", "e c p q -> (c p q) e"),
    Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias"),
    *norm(LAYER + "norm1", STACK + "attention_norm"),
    *(
        r
        for n in ("query", "key", "value")
        for r in to_heads(f"{LAYER}attention.attention.{n}", f"{STACK}attention/{n}")
    ),
    *from_heads(LAYER + "attention.output.dense", STACK + "attention/out"),
    Rule(LAYER + "layer_scale1.lambda1", STACK + "attention_layer_scale"),
    *norm(LAYER + "norm2", STACK + "mlp_norm"),
    Rule(LAYER + "layer_scale2.lambda1", STACK + "mlp_layer_scale"),
    *norm("layernorm", "norm"),
    Ignore(r"embeddings\.mask_token"),  # replaces hidden patches in DINOv2's own training
)
PLAIN_MLP = (*linear(LAYER + "mlp.fc1", STACK + "mlp/up"), *linear(LAYER + "mlp.fc2", STACK + "mlp/down"))
JOINED = tuple(f"{STACK}mlp/{name}/" for name in ("gate", "up"))
GATED_MLP = (
    Rule(LAYER + "mlp.weights_in.weight", tuple(f"{path}kernel" for path in JOINED), "out in -> in out"),
    Rule(LAYER + "mlp.weights_in.bias", tuple(f"{path}bias" for path in JOINED)),
    *linear(LAYER + "mlp.weights_out", STACK + "mlp/down"),
)

REGISTERS = {"dinov2": False, "dinov2_with_registers": True}  # model_type
MOST_RATIO = 1000  # of an MLP's hidden channels to the model's; infinity and NaN are not below
COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
REQUIRED = (*COUNTS, "mlp_ratio", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn", "hidden_act", "num_channels")


def dinov2_config(config: Mapping) -> DinoConfig:
    """A config.json of `transformers` -> our config. Raises WeightError with every missing or unsupported option."""
    model = config.get("model_type")
    if not isinstance(model, str) or model not in REGISTERS:
        raise WeightError(f"config.json names the model_type {shown(model)}; known are {' and '.join(REGISTERS)}")
    counts = (*COUNTS, "num_register_tokens") if REGISTERS[model] else COUNTS
    faults = [f"{name} is missing" for name in dict.fromkeys((*REQUIRED, *counts)) if config.get(name) is None]
    allowed = {name: isinstance(config.get(name), int) and config[name] > 0 for name in counts}
    allowed |= {
        "hidden_act": config.get("hidden_act") == "gelu",
        "num_channels": config.get("num_channels") == 3,
        "mlp_ratio": isinstance(config.get("mlp_ratio"), int | float) and 0 < config["mlp_ratio"] < MOST_RATIO,
        "head_dim": False,
    }
    faults += [
        f"{n} = {shown(config[n])} is not supported"
        for n, ok in allowed.items()
        if config.get(n) is not None and not ok
    ]
    if not faults and config["hidden_size"] % config["num_attention_heads"]:
        faults.append("num_attention_heads does not divide hidden_size")
    if faults:
        raise WeightError(f"DINOv2's config.json does not fit: {'; '.join(faults)}")
    width, gated = config["hidden_size"], config["use_swiglu_ffn"]
    hidden = int(width * config["mlp_ratio"])
    return DinoConfig(
        layers=config["num_hidden_layers"],
        width=width,
        heads=config["num_attention_heads"],
        mlp_hidden=-(-int(hidden * 2 / 3) // 8) * 8 if gated else hidden,  # two thirds, up to a multiple of 8
        grid=config["image_size"] // config["patch_size"],
        patch=config["patch_size"],
        gated_mlp=gated,
        registers=config["num_register_tokens"] if REGISTERS[model] else 0,
        antialias=REGISTERS[model],
        qkv_bias=config["qkv_bias"],
        norm_eps=config["layer_norm_eps"],
    )


def table(cfg: DinoConfig) -> Table:
    """The weight table of `abstract_params(cfg)`."""
    return ENCODER + (GATED_MLP if cfg.gated_mlp else PLAIN_MLP)


def abstract_params(cfg: DinoConfig) -> dict:
    """Shapes and types of the parameters of DinoEncoder(cfg)."""
    init = partial(DinoEncoder(cfg).init, images=jnp.zeros((1, cfg.patch, cfg.patch, cfg.channels)))
    return jax.eval_shape(init, jax.random.key(0))["params"]


def import_dinov2(tensors: Mapping[str, np.ndarray], config: Mapping) -> tuple[DinoConfig, dict]:
    """Tensors and config.json of Dinov2Model or Dinov2WithRegistersModel -> our config and DinoEncoder's parameters.

    The parameters are NumPy arrays. Raises WeightError.
    """
    cfg = dinov2_config(config)
    return cfg, import_tensors(table(cfg), tensors, abstract_params(cfg))


def load_dinov2(folder: str | Path) -> tuple[DinoConfig, dict]:
    """`import_dinov2` of a folder with config.json and one or several safetensors files. Raises WeightError."""
    return import_dinov2(FolderTensors(Path(folder)), read_config(Path(folder)))
