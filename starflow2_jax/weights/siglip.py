"""The vision encoder of SigLIP and SigLIP2 (arXiv 2303.15343, 2502.14786) in the format of `transformers`: config.json
-> DinoConfig, tensors -> our parameters. Checkpoints of one resolution only, not those called NaFlex.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.errors import shown
from starflow2_jax.models.dinov2 import DinoConfig
from starflow2_jax.weights.dinov2 import abstract_params
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

PREFIX = "vision_model."  # of whole models' tensors, and of all that transformers 4 wrote
LAYER, STACK = "encoder.layers.{layer}.", "stack/layers/"
HALF = (0.5, 0.5, 0.5)  # mean and deviation of pixels in 0..1
DEFAULTS: dict[str, Any] = dict(  # what a config.json need not say
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
    num_channels=3,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
COUNTS = tuple(name for name, value in DEFAULTS.items() if isinstance(value, int))


def siglip_config(config: Mapping) -> DinoConfig:
    """A config.json of `transformers`, of a whole model or of its vision encoder -> our config.

    Raises WeightError with every unsupported option.
    """
    if config.get("model_type") == "siglip" and isinstance(config.get("vision_config"), dict):
        config = {"model_type": "siglip_vision_model", **config["vision_config"]}
    if config.get("model_type") != "siglip_vision_model":
        raise WeightError(
            f"config.json names the model_type {shown(config.get('model_type'))}; known are siglip and "
            f"siglip_vision_model, which SigLIP2's checkpoints of one resolution have, too"
        )
    values: dict[str, Any] = DEFAULTS | {name: config[name] for name in DEFAULTS if name in config}
    allowed = {name: type(values[name]) is int and values[name] > 0 for name in COUNTS}
    allowed["num_channels"] = values["num_channels"] == 3
    allowed["hidden_act"] = values["hidden_act"] == DEFAULTS["hidden_act"]
    allowed["layer_norm_eps"] = isinstance(values["layer_norm_eps"], float) and 0 < values["layer_norm_eps"] < 1
    faults = [f"{name} = {shown(values[name])} is not supported" for name, ok in allowed.items() if not ok]
    if not faults and values["hidden_size"] % values["num_attention_heads"]:
        faults.append("num_attention_heads does not divide hidden_size")
    if faults:
        raise WeightError(f"SigLIP's config.json does not fit: {'; '.join(faults)}")
    return encoder_config(
        layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        mlp_hidden=values["intermediate_size"],
        grid=values["image_size"] // values["patch_size"],
        patch=values["patch_size"],
        norm_eps=values["layer_norm_eps"],
    )


def encoder_config(mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF, **sizes: Any) -> DinoConfig:
    """The config of an encoder of SigLIP's form: DINOv2's without class token and layer scale. sizes: its fields."""
    return DinoConfig(class_token=False, layer_scale=False, tanh_gelu=True, mean=mean, std=std, **sizes)


def _rules(prefix: str) -> Iterator[Rule | Ignore]:
    """The weight table of the encoder. prefix: what the sources' names begin with."""
    embeddings, layer = f"{prefix}embeddings.", prefix + LAYER
    yield Rule(f"{embeddings}patch_embedding.weight", "patch_embedding/kernel", "e c p q -> (c p q) e")
    yield Rule(f"{embeddings}patch_embedding.bias", "patch_embedding/bias")
    yield Rule(f"{embeddings}position_embedding.weight", "position_embedding")
    yield from norm(f"{layer}layer_norm1", f"{STACK}attention_norm")
    for short, part in {"q": "query", "k": "key", "v": "value"}.items():
        yield from to_heads(f"{layer}self_attn.{short}_proj", f"{STACK}attention/{part}")
    yield from from_heads(f"{layer}self_attn.out_proj", f"{STACK}attention/out")
    yield from norm(f"{layer}layer_norm2", f"{STACK}mlp_norm")
    yield from linear(f"{layer}mlp.fc1", f"{STACK}mlp/up")
    yield from linear(f"{layer}mlp.fc2", f"{STACK}mlp/down")
    yield from norm(f"{prefix}post_layernorm", "norm")
    name = prefix.replace(".", r"\.")
    yield Ignore(rf"{name}head\..*")  # pools the features to one vector
    yield Ignore(rf"{name}embeddings\.position_ids")


def table(names: Collection[str]) -> Table:
    """The weight table of a checkpoint with these tensors."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    return (*_rules(prefix), Ignore(r"text_model\..*|logit_scale|logit_bias"))


def import_siglip(tensors: Mapping[str, np.ndarray], config: Mapping) -> tuple[DinoConfig, dict]:
    """Tensors and config.json of SiglipModel or SiglipVisionModel -> our config and DinoEncoder's parameters.

    The parameters are NumPy arrays. Raises WeightError.
    """
    cfg = siglip_config(config)
    return cfg, import_tensors(table(tensors.keys()), tensors, abstract_params(cfg))


def load_siglip(folder: str | Path) -> tuple[DinoConfig, dict]:
    """`import_siglip` of a folder with config.json and one or several safetensors files. Raises WeightError."""
    return import_siglip(FolderTensors(Path(folder)), read_config(Path(folder)))
