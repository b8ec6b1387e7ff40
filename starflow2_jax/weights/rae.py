"""RAE's autoencoders (arXiv 2510.11690) in the format of `diffusers`: a folder of AutoencoderRAE -> a codec folder.

Such a codec is DINOv2 with registers, or SigLIP2, and a pixel decoder; its latents are the features themselves. The
training of a codec adds the networks that compress them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.checkpoints.atomic_folder import new_folder
from starflow2_jax.checkpoints.codec import write_codec
from starflow2_jax.codecs.fae import FaeCodec
from starflow2_jax.models.dinov2 import DinoConfig
from starflow2_jax.models.fae import FaeConfig, PixelDecoder, PixelDecoderConfig
from starflow2_jax.weights import dinov2, siglip
from starflow2_jax.weights.folder import DIFFUSERS, FolderTensors, read_config
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

LAYER, STACK = "decoder.decoder_layers.{layer}.", "pixel_decoder/stack/layers/"
FIRST_NAMES = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
} | {"out": "attention.output.dense"}
# Later names of the same tensors: of the decoder by `diffusers`, of the encoder by `transformers` 5.
DECODER_NAMES = {
    "query": "attention.to_q",
    "key": "attention.to_k",
    "value": "attention.to_v",
    "out": "attention.to_out.0",
}
ENCODER_NAMES = {name: f"attention.{name[0]}_proj" for name in FIRST_NAMES}
EPS = 1e-5  # AutoencoderRAE adds it to the deviations
STATISTICS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
COUNTS = (
    *(f"encoder_{name}" for name in ("hidden_size", "patch_size", "num_hidden_layers", "input_size")),
    *(f"decoder_{name}" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    "patch_size",
)
HEAD = 64  # channels of a head of the encoder, as AutoencoderRAE builds it
KINDS = {"dinov2": "dinov2", "siglip2": "siglip"}  # encoder_type -> kind of encoder


def rae_config(config: Mapping, tensors: Mapping[str, np.ndarray]) -> tuple[FaeConfig, DinoConfig]:
    """A config.json of AutoencoderRAE -> the sizes of the pixel decoder (without other networks), and of the encoder.

    `tensors` give the normalisation of pixels. Raises WeightError with every missing or unsupported option.
    """
    if config.get("_class_name") != "AutoencoderRAE":
        raise WeightError(f"config.json names the class {config.get('_class_name')!r}; only AutoencoderRAE is known")
    faults = [f"{name} is missing" for name in COUNTS if config.get(name) is None]
    faults += [
        f"{name} = {config[name]!r} is not supported"
        for name in COUNTS
        if config.get(name) is not None and not (type(config[name]) is int and config[name] > 0)
    ]
    for name, known in {"encoder_type": tuple(KINDS), "num_channels": (3,)}.items():
        if config.get(name) not in known:
            faults.append(
                f"{name} = {config.get(name)!r} is not supported, only {' and '.join(repr(each) for each in known)}"
            )
    if not faults:
        for name, by in (("encoder_input_size", config["encoder_patch_size"]), ("encoder_hidden_size", HEAD)):
            if config[name] % by:
                faults.append(f"{name} = {config[name]} must be a multiple of {by}")
        if config["decoder_hidden_size"] % config["decoder_num_attention_heads"]:
            faults.append("decoder_num_attention_heads does not divide decoder_hidden_size")
    if faults:
        raise WeightError(f"RAE's config.json does not fit: {'; '.join(faults)}")
    # Each fp32 number as users write it, 0.485 in place of 0.48500001.
    mean, std = (tuple(float(str(x)) for x in np.float32(tensors[name]).ravel()) for name in STATISTICS[:2])
    grid = config["encoder_input_size"] // config["encoder_patch_size"]
    width = config["encoder_hidden_size"]
    sizes = dict(layers=config["encoder_num_hidden_layers"], width=width, heads=width // HEAD)
    sizes |= dict(patch=config["encoder_patch_size"], mean=mean, std=std)
    if config["encoder_type"] == "siglip2":
        encoder = siglip.encoder_config(mlp_hidden=3072, grid=256 // sizes["patch"], **sizes)
    else:
        grid_side = 518 // sizes["patch"]
        encoder = DinoConfig(mlp_hidden=4 * width, grid=grid_side, registers=4, antialias=True, **sizes)
    decoder = PixelDecoderConfig(
        width=config["decoder_hidden_size"],
        layers=config["decoder_num_hidden_layers"],
        heads=config["decoder_num_attention_heads"],
        head_dim=config["decoder_hidden_size"] // config["decoder_num_attention_heads"],
        mlp_hidden=config["decoder_intermediate_size"],
        patch=config["patch_size"],
        gated_mlp=False,
        norm_eps=1e-12,
        positions="sincos",
        class_token=True,
        mean=mean,
        std=std,
    )
    return FaeConfig(features=width, grid=(grid, grid), channels=0, pixel_decoder=decoder), encoder


def table(networks: FaeConfig, encoder: DinoConfig, names: Collection[str]) -> Table:
    """The weight table of `abstract_params`. `names`: the folder's tensors, because versions name them differently."""
    return (*_encoder_rules(encoder, names), *_decoder_rules(networks.pixel_decoder, names))


def _encoder_rules(cfg: DinoConfig, names: Collection[str]) -> Iterator[Rule | Ignore]:
    """The encoder's own rules, without the affine part of its last LayerNorm, which RAE removes."""
    later = any(".attention.q_proj." in name for name in names)
    for rule in dinov2.table(cfg) if cfg.class_token else siglip.table(_own(names)):
        if isinstance(rule, Ignore):
            yield Ignore(rf"encoder\.({rule.pattern})")
        elif rule.targets[0].startswith("norm/"):
            yield Ignore(re.escape(f"encoder.{rule.source}"))
        else:
            source = rule.source
            for part, first in FIRST_NAMES.items() if later else ():
                source = source.replace(first, ENCODER_NAMES[part])
            target = tuple(f"encoder/{path}" for path in rule.targets)
            yield replace(rule, source=f"encoder.{source}", target=target)


def _own(names: Collection[str]) -> list[str]:
    """The names of the encoder's tensors, as in a folder of the encoder alone."""
    return [name.removeprefix("encoder.") for name in names if name.startswith("encoder.")]


def _decoder_rules(cfg: PixelDecoderConfig, names: Collection[str]) -> Iterator[Rule | Ignore]:
    attention = DECODER_NAMES if any(".attention.to_q." in name for name in names) else FIRST_NAMES
    yield from linear("decoder.decoder_embed", "pixel_decoder/embedding")
    yield Rule("decoder.trainable_cls_token", "pixel_decoder/class_token", "1 1 e -> e")
    yield from norm(LAYER + "layernorm_before", STACK + "attention_norm")
    for part in ("query", "key", "value"):
        yield from to_heads(LAYER + attention[part], f"{STACK}attention/{part}")
    yield from from_heads(LAYER + attention["out"], STACK + "attention/out")
    yield from norm(LAYER + "layernorm_after", STACK + "mlp_norm")
    yield from linear(LAYER + "intermediate.dense", STACK + "mlp/up")
    yield from linear(LAYER + "output.dense", STACK + "mlp/down")
    yield from norm("decoder.decoder_norm", "pixel_decoder/norm")
    sizes = {"p": cfg.patch, "q": cfg.patch}
    yield Rule("decoder.decoder_pred.weight", "pixel_decoder/pixels/kernel", "(p q c) e -> e (c p q)", sizes)
    yield Rule("decoder.decoder_pred.bias", "pixel_decoder/pixels/bias", "(p q c) -> (c p q)", sizes)
    yield Ignore(r"decoder\.decoder_pos_embed")  # fixed, and not in every file
    yield Ignore("|".join(STATISTICS))


def abstract_params(networks: FaeConfig, encoder: DinoConfig) -> dict:
    """Shapes and types of the groups "encoder" and "pixel_decoder" that a folder fills."""
    features = jnp.zeros((1, networks.grid[0] * networks.grid[1], networks.features))
    decoder = jax.eval_shape(partial(PixelDecoder(networks).init, jax.random.key(0)), features)["params"]
    tree = dinov2.abstract_params(encoder)
    return {"encoder": {name: part for name, part in tree.items() if name != "norm"}, "pixel_decoder": decoder}


def import_rae(tensors: Mapping[str, np.ndarray], config: Mapping) -> FaeCodec:
    """Tensors and config.json of AutoencoderRAE -> a codec whose latents are the normalised features.

    AutoencoderRAE normalises features by channel and place, this codec by channel alone. Raises WeightError.
    """
    if missing := [name for name in STATISTICS if name not in tensors]:
        raise WeightError(f"the weights do not fit: missing tensor {', '.join(missing)}")
    networks, encoder = rae_config(config, tensors)
    weights = import_tensors(table(networks, encoder, tensors.keys()), tensors, abstract_params(networks, encoder))
    identity = {"scale": np.ones(encoder.width, np.float32), "bias": np.zeros(encoder.width, np.float32)}
    weights["encoder"]["norm"] = identity
    mean, std = _by_channel(tensors[STATISTICS[2]], tensors[STATISTICS[3]], encoder.width)
    kind = KINDS[config["encoder_type"]]
    return FaeCodec(networks, kind, encoder, networks.grid, mean, std, weights)


def _by_channel(mean: np.ndarray, std: np.ndarray, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over all places, from those by channel and place (C, h, w) or of all together
    (1,).

    Raises WeightError for other shapes.
    """
    if any(x.shape not in ((1,), ()) and x.shape[:1] != (channels,) for x in (mean, std)):
        raise WeightError(
            f"tensor _latents_mean {mean.shape} or _latents_std {std.shape} does not have {channels} channels"
        )
    mean, std = np.broadcast_arrays(mean.astype(np.float64), std.astype(np.float64) + EPS)
    mean, square = (np.broadcast_to(x.reshape(len(x), -1).mean(1), channels) for x in (mean, mean**2 + std**2))
    return tuple(mean.tolist()), tuple(np.sqrt(square - mean**2).tolist())


def load_rae(folder: str | Path) -> FaeCodec:
    """`import_rae` of a folder with config.json and one or several safetensors files. Raises WeightError."""
    return import_rae(FolderTensors(Path(folder), DIFFUSERS), read_config(Path(folder)))


def to_codec(source: str | Path, target: str | Path) -> None:
    """Convert a folder of AutoencoderRAE into a new codec folder `target`. Raises UserError; then no `target` is
    left.
    """
    codec = load_rae(source)
    size: Any = sum(x.nbytes for x in jax.tree.leaves(dict(codec.weights)))
    with new_folder(Path(target).resolve(), size) as folder:
        write_codec(folder, codec)
