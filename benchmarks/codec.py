"""Compares RAE's autoencoder here with that of `diffusers`: pictures encoded and decoded a second, and the memory of
decoding.

    python benchmarks/codec.py                    # DINOv2-small and a decoder of 8 layers, two CPU cores, fp32
    python benchmarks/codec.py --size base        # the sizes of RAE-dinov2-wReg-base-ViTXL-n08
    python benchmarks/codec.py --memory           # the compiled programs alone: FAE at the paper's size, batches of 1,
    8, 64

Weights are random, and the same on both sides. Both sides run in turn; the numbers are medians, and a ratio is the
reference's time over ours. `--memory` computes nothing: it reads what XLA sets aside.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from starflow2_jax.codecs.fae import FaeCodec, decode_with
from starflow2_jax.models.dinov2 import DinoConfig
from starflow2_jax.models.fae import FaeConfig, FeatureDecoder, PixelDecoder
from starflow2_jax.weights.rae import load_rae

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=2,
        encoder_input_size=56,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=80,
        patch_size=8,
    ),
    "small": dict(
        encoder_hidden_size=384,
        encoder_num_hidden_layers=12,
        decoder_hidden_size=768,
        decoder_num_hidden_layers=8,
        decoder_num_attention_heads=12,
        decoder_intermediate_size=3072,
    ),
    "base": {},  # the defaults of AutoencoderRAE
}


def both(size: str) -> tuple[Any, FaeCodec]:
    """The reference's autoencoder with random weights, and ours with the same."""
    import diffusers

    torch.manual_seed(0)
    model: Any = diffusers.AutoencoderRAE(**SIZES[size]).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, load_rae(folder)


def compare(size: str, batch: int, repeats: int, unroll: bool) -> dict[str, dict]:
    """Seconds of encoding and of decoding a batch, by both sides in turn."""
    model, codec = both(size)
    if unroll:
        codec = unrolled(codec)
    side = codec.image_shape[0]
    pictures = np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
    theirs_in = torch.from_numpy((pictures + 1) / 2).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        latents = model.encode(theirs_in).latent
        decoded = model.decode(latents).sample
    ours = jnp.asarray(latents.permute(0, 2, 3, 1).numpy())
    sides = {
        "encode": (lambda: model.encode(theirs_in), lambda: jax.block_until_ready(codec.encode(pictures))),
        "decode": (lambda: model.decode(latents), lambda: jax.block_until_ready(codec.decode(ours))),
    }
    found = {}
    for name, (theirs, own) in sides.items():
        times: dict[str, list[float]] = {"diffusers": [], "ours": []}
        own()  # compiles
        for _ in range(repeats):
            with torch.inference_mode():
                times["diffusers"].append(seconds(theirs))
            times["ours"].append(seconds(own))
        medians = {which: statistics.median(values) for which, values in times.items()}
        rates = {which: round(batch / value, 3) for which, value in medians.items()}
        found[name] = {"pictures_a_second": rates, "ratio": round(medians["diffusers"] / medians["ours"], 2)}
    difference = np.abs(np.asarray(codec.decode(ours)) - (2 * decoded.permute(0, 2, 3, 1).numpy() - 1)).max()
    found["decode"]["largest_difference"] = float(difference)
    return found


def unrolled(codec: FaeCodec) -> FaeCodec:
    """The codec whose layers are not scanned over, which is fastest on CPU."""
    networks = replace(codec.networks, unroll=codec.networks.pixel_decoder.layers)
    return replace(codec, networks=networks, encoder=replace(codec.encoder, unroll=codec.encoder.layers))


def seconds(work: Any) -> float:
    """Of one run."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def memory(networks: FaeConfig, batches: tuple[int, ...], dtype: str) -> list[dict]:
    """Bytes that decoding sets aside beside its weights, arguments and result, by batch."""
    D = networks.channels
    encoder = DinoConfig(layers=1, width=networks.features, heads=1, mlp_hidden=1, grid=1)
    codec = FaeCodec(networks, "dinov2", encoder, networks.grid, (0.0,) * D, (1.0,) * D).computing(dtype)
    tokens = networks.grid[0] * networks.grid[1]
    inputs = {"feature_decoder": (FeatureDecoder, D), "pixel_decoder": (PixelDecoder, networks.features)}
    weights = {
        name: jax.eval_shape(partial(module(networks).init, jax.random.key(0)), jnp.zeros((1, tokens, channels)))[
            "params"
        ]
        for name, (module, channels) in inputs.items()
    }
    found = []
    for batch in batches:
        latents = jax.ShapeDtypeStruct((batch, *networks.grid, D), jnp.float32)
        used: Any = decode_with.lower(codec, weights, latents).compile().memory_analysis()
        sizes = {"weights_and_latents": used.argument_size_in_bytes, "pictures": used.output_size_in_bytes}
        sizes["temporary"] = used.temp_size_in_bytes
        found.append({"batch": batch, "dtype": dtype} | {name: round(size / 2**20, 3) for name, size in sizes.items()})
    return found


def main() -> None:
    """Print a line of JSON for each comparison or batch; memory is in MiB."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="small")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument(
        "--unroll", action="store_true", help="do not scan over our layers: faster on CPU, slower to compile"
    )
    p.add_argument("--memory", action="store_true", help="memory of decoding at the paper's size, in place of speed")
    p.add_argument("--batches", default="1,8,64", help="with --memory: batches (default: 1,8,64)")
    p.add_argument("--dtype", default="float32", help="with --memory: type of the matrix products")
    p.add_argument("--layers", type=int, default=0, help="with --memory: layers of each decoder; 0: the paper's")
    args = p.parse_args()
    if args.memory:
        networks = FaeConfig()
        if args.layers:
            parts = {name: getattr(networks, name) for name in ("feature_decoder", "pixel_decoder")}
            networks = replace(networks, **{name: replace(part, layers=args.layers) for name, part in parts.items()})
        for line in memory(networks, tuple(map(int, args.batches.split(","))), args.dtype):
            print(json.dumps(line), flush=True)
        return
    for name, line in compare(args.size, args.batch, args.repeats, args.unroll).items():
        print(json.dumps({"what": name, "size": args.size, "batch": args.batch} | line), flush=True)


if __name__ == "__main__":
    main()
