"""Compares the time of a training step of the digits model with PyTorch's: same model, loss, optimizer, weights.

    python benchmarks/train.py                                  # two CPU cores, fp32
    python benchmarks/train.py --config.stages.text_to_image.rows=32

The step is that of stage text_to_image with AdamW: noise on the latents, the frozen VLM, both flows, exact likelihood,
gradient, clipping, AdamW and moving average. First the losses and gradients of both are compared; then both run in
turn.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
from torch.nn import functional as F

from starflow2_jax.config import loading as configs
from starflow2_jax.models.flow import grid_angles

EXPERIMENT = Path(__file__).parents[1] / "starflow2_jax/experiments/digits_quick.py"


def tensors(tree):
    """A JAX tree as PyTorch tensors; kernels get the layout of PyTorch's linear maps, (out, in)."""

    def leaf(path, x):
        x, name = np.asarray(x), path[-1].key
        if name in ("kernel", "bias"):
            layer = int(any(p.key == "layers" for p in path))  # the first axis of a stack's arrays is the layer
            if name == "kernel":
                ins = 2 if path[-2].key == "out" and x.ndim - layer == 3 else 1
                x = x.reshape(*x.shape[:layer], int(np.prod(x.shape[layer : layer + ins])), -1)
                x = np.swapaxes(x, -1, -2)
            else:
                x = x.reshape(*x.shape[:layer], -1)
        return torch.tensor(np.ascontiguousarray(x))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def per_layer(tree):
    """A tree with each stack (L, ...) as a list of layers, like a PyTorch module list."""
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"layers"}:
        flat, spec = jax.tree.flatten(tree["layers"])
        return [jax.tree.unflatten(spec, [x[i].clone() for x in flat]) for i in range(len(flat[0]))]
    return {k: per_layer(v) for k, v in tree.items()}


class Reference:
    """The text_to_image step in PyTorch, eager."""

    def __init__(self, config, codec_std, params: dict, frozen: dict):
        self.config, self.stage = config, config.stages.text_to_image
        self.model = m = config.model
        self.p, self.vlm = per_layer(tensors(params)), per_layer(tensors(frozen))["vlm"]
        self.noise = config.noise / torch.tensor(codec_std)
        angles = np.asarray(grid_angles(m.grid, m.grid[0], m.shallow.width // m.shallow.heads, 1e4, None))
        self.grid_angles = tuple(torch.tensor(f(angles))[:, None] for f in (np.cos, np.sin))
        leaves = jax.tree_util.tree_leaves_with_path({k: v for k, v in self.p.items() if k not in UNUSED})
        self.moving = [x.requires_grad_() for _, x in leaves]
        decays = [x for path, x in leaves if path[-1].key in ("kernel", "embedding")]
        rest = [x for path, x in leaves if path[-1].key not in ("kernel", "embedding")]
        c = self.stage.optimizer
        groups = [{"params": decays, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.b1, c.b2), eps=1e-8, fused=True)
        self.ema = [x.detach().clone() for x in self.moving]

    def step(self, batch: dict) -> float:
        latents = batch["latents"] + self.noise * torch.randn_like(batch["latents"])
        self.optimizer.zero_grad()
        loss = self.loss({**batch, "latents": latents})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.moving, self.stage.optimizer.clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.moving, 1 - self.stage.ema)
        return loss.item()

    def loss(self, batch: dict) -> torch.Tensor:
        m, p = self.model, self.p
        latents, flow = batch["latents"], batch["modality"] == 2
        B, M, N, D = latents.shape
        h, logdet = latents.reshape(B * M, N, D), 0.0
        for i in range(m.shallow_blocks):
            h, more = self.block(p["shallow"][f"block_{i}"], h, flip=i % 2 == int(m.shallow_blocks % 2 == 0))
            logdet = logdet + more
        u = h.reshape(B, M * N, D)
        here = read(u, batch["image_token_index"])
        time_, row, column = batch["positions"].unbind(-1)
        slot = torch.where(flow, (row - time_) * m.grid[1] + column - time_, 0)
        mask = batch["mask"]
        with torch.no_grad():  # no gradient of this stage goes through the VLM
            x = F.linear(here, **linear(p["adapter"]["in"])) + p["adapter"]["slot"]["embedding"][slot]
            x = F.linear(F.gelu(x), **linear(p["adapter"]["out"]))
            x = torch.where(flow[..., None], x, self.vlm["token_embedding"]["embedding"][batch["tokens"]])
            y = self.stack(self.vlm["stack"], x, batch["vlm_angles"], mask, m.vlm.heads, m.vlm.kv_heads)
            y = F.rms_norm(y, y.shape[-1:], self.vlm["norm"]["scale"], 1e-6)
        image = F.linear(here, **linear(p["embed_u"])) + p["embed_slot"]["embedding"][slot]
        c = torch.where(flow[..., None], image, F.linear(y, **linear(p["embed_y"])))
        c = self.stack(p["deep"], c, batch["deep_angles"], mask, m.deep.heads, m.deep.heads)
        raw = F.linear(F.rms_norm(c, c.shape[-1:], 1 + p["deep_norm"]["scale"], 1e-6), **linear(p["head"]))
        mean, scale = gaussian(raw)
        mean, scale = (read(a, batch["predictors"]) for a in (mean, scale))
        z = (u - mean) / scale
        nll = (0.5 * z**2 + scale.log()).reshape(B, M, -1).sum(-1) - logdet.reshape(B, M, -1).sum(-1)
        return (batch["image_weight"] * nll).sum() / (batch["image_weight"].sum() * N * D)

    def block(self, p: dict, h: torch.Tensor, flip: bool):
        h = h.flip(1) if flip else h
        B, N, D = h.shape
        seen = torch.cat([p["start_token"].expand(B, 1, D), h[:, :-1]], 1)
        x = F.linear(seen, **linear(p["proj_in"]))
        t = self.model.shallow
        x = self.stack(p["stack"], x, self.grid_angles, None, t.heads, t.heads)
        raw = F.linear(F.rms_norm(x, x.shape[-1:], 1 + p["norm"]["scale"], 1e-6), **linear(p["proj_out"]))
        mean, scale = gaussian(raw)
        z, logdet = (h - mean) / scale, -scale.log()
        return (z.flip(1), logdet.flip(1)) if flip else (z, logdet)

    def stack(self, layers, x, angles, mask, heads: int, kv: int):
        for p in layers:
            x = layer(p, x, angles, mask, heads, kv)
        return x


UNUSED = ("adapter", "w_vlm", "w_d")


def layer(p: dict, x, angles, mask, heads: int, kv: int):
    """One pre-norm layer: the flow's (zero-centred RMS norms, norms of q and k, squared ReLU) or Qwen's."""
    qwen, E = "gate" in p["mlp"], x.shape[-1:]

    def norm(v, w):
        return F.rms_norm(v, v.shape[-1:], w if qwen else 1 + w, 1e-6)

    a, (B, S) = p["attention"], x.shape[:2]
    y = norm(x, p["attention_norm"]["scale"])
    q = F.linear(y, **linear(a["query"])).view(B, S, heads, -1)
    k, v = (F.linear(y, **linear(a[n])).view(B, S, kv, -1) for n in ("key", "value"))
    if "query_norm" in a:
        q, k = norm(q, a["query_norm"]["scale"]), norm(k, a["key_norm"]["scale"])
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=kv != heads)
    x = x + F.linear(y.transpose(1, 2).reshape(B, S, *E), **linear(a["out"]))
    y = norm(x, p["mlp_norm"]["scale"])
    up = F.linear(y, **linear(p["mlp"]["up"]))
    hidden = F.silu(F.linear(y, **linear(p["mlp"]["gate"]))) * up if qwen else F.relu(up).square()
    return x + F.linear(hidden, **linear(p["mlp"]["down"]))


def linear(p: dict) -> dict:
    return {"weight": p["kernel"], "bias": p.get("bias")}


def gaussian(raw):
    a, b = raw.chunk(2, -1)
    return b, F.softplus(a + 0.541324854612918)


def read(source, index):
    return source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))


def rotate(x, angles):
    (cos, sin), (a, b) = angles, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def torch_batch(batch, model) -> dict:
    """A batch as a data loader would give it, with rotary cosines and sines, mask and image_token_index."""
    from starflow2_jax.models import attention, kernels

    t = {n: torch.tensor(np.asarray(getattr(batch, n))) for n in ("modality", "positions", "latents", "image_weight")}
    t["tokens"] = torch.tensor(np.asarray(batch.tokens))
    t["image_token_index"] = torch.tensor(np.asarray(batch.image_token_index), dtype=torch.int64)
    t["predictors"] = torch.tensor(np.asarray(batch.image_predictors()), dtype=torch.int64)
    t["mask"] = torch.tensor(np.asarray(kernels.visible(batch.segments, batch.segments, 0, batch.segments.shape[1])))[
        :, None
    ]
    for name, theta, sections in (
        ("vlm", model.vlm.rotary_theta, model.vlm.rotary_sections),
        ("deep", 1e4, model.deep_rotary_sections),
    ):
        angles = np.asarray(attention.multimodal_angles(batch.positions, 2 * sum(sections), theta, tuple(sections)))
        t[f"{name}_angles"] = tuple(torch.tensor(f(angles))[:, :, None] for f in (np.cos, np.sin))
    return t


def compare(trainer, reference: Reference, params, frozen, batch, theirs: dict) -> None:
    """Compare loss and gradients of both without noise. Raises AssertionError if they differ."""
    from starflow2_jax.stages import STAGES
    from starflow2_jax.training import losses
    from starflow2_jax.training.step import Objective, loss_sums

    stage = STAGES["text_to_image"]

    def loss(moving):
        sums = loss_sums(trainer.model, params | frozen | moving, stage, batch, Objective(), jax.random.key(0))
        return sums["image"] / losses.counts(batch)["image"]

    ours, gradient = jax.jit(jax.value_and_grad(loss))({k: params[k] for k in stage.trains})
    value = reference.loss(theirs)
    value.backward()
    np.testing.assert_allclose(value.item(), ours, rtol=1e-4)
    grads = jax.tree.leaves(per_layer(tensors({k: gradient[k] for k in sorted(stage.trains)})))
    assert len(grads) == len(reference.moving)
    for a, x in zip(grads, reference.moving, strict=True):
        np.testing.assert_allclose(x.grad, a, rtol=1e-3, atol=1e-4 * float(max(a.abs().max(), 1e-3)))
    count = sum(x.numel() for x in reference.moving)
    print(f"loss {float(ours):.5f} and {value.item():.5f}; gradients of {count} parameters agree")


def alternate(runs: dict, repeats: int) -> dict:
    """Run all in turn: the median and least milliseconds of each, and the ratios to the first.

    Other programs on the machine disturb the least time least.
    """
    for run in runs.values():
        run(), run()
    times = []
    for _ in range(repeats):
        row = []
        for run in runs.values():
            begin = time.perf_counter()
            run()
            row.append(1e3 * (time.perf_counter() - begin))
        times.append(row)
    columns = list(zip(*times, strict=True))
    found = {"repeats": repeats, "load": [round(x, 1) for x in os.getloadavg()]}
    for name, column in zip(runs, columns, strict=True):
        found[name] = {"median": round(statistics.median(column), 1), "least": round(min(column), 1)}
    first, *others = runs
    for name, column in zip(others, columns[1:], strict=True):
        pairs = statistics.median(b / a for a, b in zip(columns[0], column, strict=True))
        found[f"{name} / {first}"] = {
            "median of pairs": round(pairs, 2),
            "of the least": round(min(column) / min(columns[0]), 2),
        }
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=30, help="timed steps")
    p.add_argument("--cores", type=int, default=2, help="cores that both may use, and threads of PyTorch")
    p.add_argument("--devices", type=int, help="JAX's CPU devices (default: one for each core)")
    p.add_argument("--compile", action="store_true", help="time PyTorch with torch.compile, too")
    args, rest = p.parse_known_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices or args.cores)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    overrides = ["stages.text_to_image.optimizer.name=adamw", *(r.removeprefix("--config.") for r in rest)]
    config = configs.load(EXPERIMENT, overrides)

    from starflow2_jax.benchmarks.program import build

    with tempfile.TemporaryDirectory() as folder:
        ours = build(config, "text_to_image", folder)
    rng = np.random.default_rng(0)
    params, frozen = (
        jax.tree.map(lambda x: np.asarray(x) + 0.02 * rng.standard_normal(x.shape).astype(np.float32), tree)
        for tree in (ours.state.params, ours.frozen)
    )
    batch = jax.tree.map(np.asarray, ours.batch)
    torch.set_num_threads(args.cores)
    reference = Reference(config, ours.trainer.codec.std, params, frozen)
    theirs = torch_batch(batch, config.model)
    compare(ours.trainer, reference, params, frozen, batch, theirs)

    runs = {"ours": ours.run, "PyTorch": lambda: reference.step(theirs)}
    if args.compile:
        compiled = Reference(config, ours.trainer.codec.std, params, frozen)
        compiled.loss = torch.compile(compiled.loss)
        runs["PyTorch compiled"] = lambda: compiled.step(theirs)
    print("jax", jax.__version__, "torch", torch.__version__, vars(args), rest)
    print(json.dumps(alternate(runs, args.repeats)))


if __name__ == "__main__":
    main()
