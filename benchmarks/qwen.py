"""Compares the speed of Qwen2.5-VL's text decoder with the PyTorch model of `transformers`.

    python benchmarks/qwen.py                                       # two CPU cores, fp32
    python benchmarks/qwen.py --size 7b --dtype bfloat16 --device gpu

"forward" computes the logits of a batch. "gradient" runs forward and backward to the input embeddings, as the training
of the adapter does. "decoding" is greedy, with a key/value cache, after a prompt. Weights are random, and the same on
both sides if the model is small. Both sides run in turn; the numbers are medians, and a ratio is the reference's time
over ours.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from starflow2_jax.models import kernels
from starflow2_jax.models.layers import separate_layers
from starflow2_jax.models.qwen import Qwen, QwenConfig
from starflow2_jax.sequence import text_positions
from starflow2_jax.weights.qwen import QWEN2_5_VL

SMALL = QwenConfig(
    vocabulary=8192,
    layers=8,
    width=512,
    heads=8,
    kv_heads=2,
    head_dim=64,
    mlp_hidden=1408,
    rotary_sections=(8, 12, 12),
    unroll=8,
)


def reference(cfg: QwenConfig, dtype: str, device: str) -> Any:
    """The reference's text decoder with random weights."""
    text = dict(
        vocab_size=cfg.vocabulary,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": cfg.rotary_theta,
            "mrope_section": list(cfg.rotary_sections),
        },
    )
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=cfg.width)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=cfg.tied_head)
    config.dtype = getattr(torch, dtype)
    with torch.device(device):
        return transformers.Qwen2_5_VLForConditionalGeneration._from_config(config).eval()


def ours(cfg: QwenConfig, model: Any) -> tuple[Qwen, dict]:
    """Our decoder, with the weights of the reference `model`, or random ones if that is None."""
    module = Qwen(cfg)
    x, positions = jnp.zeros((1, 1, cfg.width), cfg.dtype), jnp.zeros((1, 1, 3), jnp.int32)

    def every_part(m):
        m.embed(jnp.zeros((1, 1), jnp.int32))
        return m.logits(m.run(x, positions, jnp.ones((1, 1, 1), bool))[0])

    @jax.jit
    def init(key):
        return jax.tree.map(lambda p: p.astype(cfg.dtype), module.init(key, method=every_part)["params"])

    params = init(jax.random.key(0))
    if model is not None:
        params = _copy(cfg, params, {n: t.detach().cpu().float().numpy() for n, t in model.state_dict().items()})
    return module, params


def _copy(cfg: QwenConfig, params: dict, tensors: dict) -> dict:
    from starflow2_jax.weights import qwen
    from starflow2_jax.weights.table import import_tensors

    seen = {name: t for name, t in tensors.items() if "visual" not in name}
    seen = {n: t for n, t in seen.items() if not (cfg.tied_head and n == "lm_head.weight")}
    shapes = {"vlm": jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)}
    table = qwen.table(replace(cfg, vision=None), tensors)
    return jax.tree.map(jnp.asarray, import_tensors(table, seen, shapes)["vlm"])


@partial(jax.jit, static_argnums=0)
def forward(module: Qwen, params, tokens, positions):
    mask = kernels.visible(None, None, 0, tokens.shape[1])
    x = module.apply({"params": params}, tokens, method=Qwen.embed)
    hidden, _ = module.apply({"params": params}, x, positions, mask, method=Qwen.run)
    return module.apply({"params": params}, hidden, method=Qwen.logits)


@partial(jax.jit, static_argnums=0)
def gradient(module: Qwen, params, x, positions):
    """The gradient of the mean of the squared logits with respect to the embeddings x."""

    def loss(x):
        hidden, _ = module.apply(
            {"params": params}, x, positions, jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool)), method=Qwen.run
        )
        return jnp.mean(jnp.square(module.apply({"params": params}, hidden, method=Qwen.logits)))

    return jax.grad(loss)(x)


@partial(jax.jit, static_argnums=(0, 3))
def decode(module: Qwen, params, tokens, count: int):
    """Decode greedily: tokens (B, S) -> (B, count)."""
    B, S = tokens.shape

    def apply(tokens, start, cache):
        x = module.apply({"params": params}, tokens, method=Qwen.embed)
        positions = jnp.broadcast_to((start + jnp.arange(tokens.shape[1]))[None, :, None], (*tokens.shape, 3))
        hidden, cache = module.apply({"params": params}, x, positions, None, cache, method=Qwen.run)
        return module.apply({"params": params}, hidden[:, -1], method=Qwen.logits).argmax(-1), cache

    def step(carry, i):
        token, cache = carry
        new, cache = apply(token[:, None], S + i, cache)
        return (new, cache), token

    cache = module.apply({"params": params}, B, S + count, method=Qwen.empty_cache)
    (_, _), written = jax.lax.scan(step, apply(tokens, 0, cache), jnp.arange(count))
    return written.T


def beside(name: str, mine, theirs, tokens: int, repeats: int) -> dict:
    """Run both in turn; print and return the tokens per second of each and their ratio."""
    mine(), theirs()
    times = []
    for _ in range(repeats):
        pair = []
        for run in (mine, theirs):
            begin = time.perf_counter()
            run()
            pair.append(time.perf_counter() - begin)
        times.append(pair)
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    found = {"what": name, "ours": round(tokens / a, 1), "reference": round(tokens / b, 1), "ratio": round(ratio, 2)}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=("small", *QWEN2_5_VL), default="small")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--new", type=int, default=64, help="tokens to decode")
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    jax.config.update("jax_platforms", a.device if a.device == "cpu" else "cuda,cpu")
    cfg = replace(SMALL if a.size == "small" else QWEN2_5_VL[a.size], dtype=a.dtype, vision=None)
    device = "cpu" if a.device == "cpu" else "cuda"
    model = reference(cfg, a.dtype, device)
    module, params = ours(cfg, model if a.size == "small" else None)
    sampler, apart = Qwen(replace(cfg, scan=False)), separate_layers(params)
    tokens = np.random.default_rng(0).integers(0, cfg.vocabulary, (a.batch, a.length))
    positions = np.broadcast_to(text_positions(0, a.length), (a.batch, a.length, 3))
    ids = torch.tensor(tokens, device=device)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((a.batch, a.length, cfg.width)), cfg.dtype)
    x_torch = torch.tensor(np.asarray(x, np.float32), device=device, dtype=getattr(torch, a.dtype))

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def their_forward():
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        wait()
        return logits

    def their_gradient():
        leaf = x_torch.clone().requires_grad_()
        model.requires_grad_(False)(inputs_embeds=leaf).logits.float().square().mean().backward()
        wait()
        return leaf.grad

    def their_decode():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=a.new,
            min_new_tokens=a.new,
            do_sample=False,
            pad_token_id=0,
        )
        wait()
        return written[:, ids.shape[1] :]

    tokens = jnp.asarray(tokens, jnp.int32)
    runs = {
        "forward": (lambda: forward(module, params, tokens, positions), their_forward, tokens.size),
        "gradient": (lambda: gradient(module, params, x, positions), their_gradient, tokens.size),
        "decoding": (lambda: decode(sampler, apart, tokens, a.new), their_decode, a.batch * a.new),
    }
    if a.size == "small" and a.dtype == "float32":
        for name, (mine, theirs, _) in runs.items():
            m, t = np.asarray(mine(), np.float32), theirs().detach().float().cpu().numpy()
            print(name, "worst difference", np.abs(m - t).max(), "of", np.abs(t).max())
    print(jax.devices()[0].device_kind, "jax", jax.__version__, "torch", torch.__version__, vars(a))
    for name, (mine, theirs, count) in runs.items():
        beside(name, lambda mine=mine: jax.block_until_ready(mine()), theirs, count, a.repeats)


if __name__ == "__main__":
    main()
