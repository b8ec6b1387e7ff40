"""Compares the images per second of our sampler, token by token and with Jacobi passes, with those of a PyTorch loop.

    python benchmarks/sampling.py --checkpoint quickstart/checkpoint --images 1 8 64      # a trained model
    python benchmarks/sampling.py --mid --images 1 8                                      # a random one of width 512
    python benchmarks/sampling.py --mid --images 1 8 64 --jacobi 1 8 64 --device cuda     # both sides on a GPU

The PyTorch loop is plain: both streams run token by token through a key/value cache, then each block of the shallow
flow does. Both sides run the same model and draw with the same noise, so their images can be compared. They run in
turn; the numbers are medians. `--device` is PyTorch's device; ours is JAX's default device. On a GPU, fp32 products are
TF32 on both sides, which is JAX's default.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data import digits, tokenizer
from starflow2_jax.data.documents import Text
from starflow2_jax.models.flow import SOFTPLUS_ONE, grid_angles
from starflow2_jax.models.jacobi import Jacobi
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, init_params
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.inversion import Inversion

ACTIVATIONS = {"silu": torch.nn.functional.silu, "relu2": lambda x: torch.relu(x).square()}


def mid_size() -> Sampler:
    """A random model of width 512 with images of 256 tokens; matrices that usually start at zero are random, too."""
    flow = dict(width=512, heads=8, mlp_hidden=2048, norm="rms_zero", activation="relu2", qk_norm="rms_zero")
    cfg = PretzelConfig(
        vlm=QwenConfig(
            vocabulary=512,
            layers=6,
            width=512,
            heads=8,
            kv_heads=2,
            head_dim=64,
            mlp_hidden=1408,
            rotary_sections=(8, 12, 12),
            unroll=6,
        ),
        grid=(16, 16),
        channels=32,
        shallow=TransformerConfig(layers=2, unroll=2, **flow),
        shallow_blocks=2,
        deep=TransformerConfig(layers=8, unroll=8, **flow),
        adapter_hidden=512,
    )
    model, rng = Pretzel(cfg), np.random.default_rng(0)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    zeros = ("head", "proj_out", "w_vlm", "w_d")

    def leaf(path, x):
        small = any(getattr(k, "key", "") in zeros for k in path) and x.ndim > 1
        return jnp.asarray(0.01 * rng.standard_normal(x.shape), jnp.float32) if small else x

    params = jax.tree_util.tree_map_with_path(leaf, params)
    codec = PatchCodec((64, 64), 2, 4, (0.0,) * 32, (1.0,) * 32)
    return Sampler(model, params, tokenizer.train(digits.texts(), 416), codec)


class Stack:
    """A stack of layers in PyTorch, token by token, from our parameters."""

    def __init__(self, cfg: TransformerConfig, params: dict):
        self.cfg = cfg
        p = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float32)), params)
        self.layers = [p[f"layers_{i}"] for i in range(cfg.layers)]

    def norm(self, x, scale, eps=None):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (self.cfg.norm_eps if eps is None else eps))
        return y * (1 + scale if self.cfg.norm == "rms_zero" or eps else scale)

    def rotate(self, x, angles):
        cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def __call__(self, x, angles, cache: list):
        """x (B, S, E), angles (S, K/2) -> (B, S, E).

        `cache`: a list of (keys, values), one for each layer; it grows.
        """
        c = self.cfg
        B, S, _ = x.shape
        for i, p in enumerate(self.layers):
            a, h = p["attention"], self.norm(x, p["attention_norm"]["scale"])
            q, k, v = (
                torch.einsum("bse,ehk->bshk", h, a[n]["kernel"]) + a[n].get("bias", 0)
                for n in ("query", "key", "value")
            )
            if c.qk_norm != "none":
                q, k = (self.norm(t, a[n]["scale"], 1e-6) for t, n in ((q, "query_norm"), (k, "key_norm")))
            q, k = self.rotate(q, angles), self.rotate(k, angles)
            if len(cache) > i:
                k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
                cache[i] = k, v
            else:
                cache.append((k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=S > 1, enable_gqa=True
            ).transpose(1, 2)
            x = x + torch.einsum("bshk,hke->bse", out, a["out"]["kernel"])
            m, h = p["mlp"], self.norm(x, p["mlp_norm"]["scale"])
            act = ACTIVATIONS[c.activation]
            up = h @ m["up"]["kernel"]
            x = x + (act(h @ m["gate"]["kernel"]) * up if c.gated_mlp else act(up)) @ m["down"]["kernel"]
        return x


class Reference:
    """Pretzel's generation of one image a row, as a plain PyTorch loop."""

    def __init__(self, sampler: Sampler):
        self.cfg, self.skips = sampler.model.cfg, sampler.skips
        p = sampler.params
        self.p = jax.tree.map(
            lambda x: torch.tensor(np.asarray(x, np.float32)), {k: v for k, v in p.items() if k != "deep"}
        )
        self.vlm, self.deep = Stack(self.cfg.vlm.transformer, p["vlm"]["stack"]), Stack(self.cfg.deep, p["deep"])
        self.shallow = [
            Stack(b.transformer, p["shallow"][f"block_{i}"]["stack"]) for i, b in enumerate(self.cfg.shallow_chain)
        ]

    def angles(self, positions, head, theta, sections):
        frequencies = theta ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        return positions.float()[:, np.repeat(np.arange(3), sections)] * frequencies

    def step(self, x, positions, image_in, caches):
        """The VLM's input x (B, S, E) -> mean and scale (B, D) of the image token after the last position."""
        c, p = self.cfg, self.p
        v = c.vlm
        y = self.vlm(x, self.angles(positions, v.head_dim, v.rotary_theta, v.rotary_sections), caches[0])
        y = self.vlm.norm(y, p["vlm"]["norm"]["scale"])
        if image_in is None:
            d = y @ p["embed_y"]["kernel"] + p["embed_y"]["bias"]
        else:
            d = image_in + (y @ p["w_vlm"]["kernel"] if self.skips else 0)
        angles = self.angles(positions, c.deep.head, c.deep_rotary_theta, c.deep_rotary_sections)
        d = self.deep.norm(self.deep(d, angles, caches[1]), p["deep_norm"]["scale"], 1e-6)[:, -1]
        scale, mean = (d @ p["head"]["kernel"] + p["head"]["bias"]).chunk(2, -1)
        return mean, torch.nn.functional.softplus(scale + SOFTPLUS_ONE)

    @torch.no_grad()
    def generate(self, tokens: np.ndarray, noise: np.ndarray):
        """Token ids (B, S) that end with <|vision_start|>, and noise (B, N, D) -> latents (B, N, D)."""
        c, p, noise = self.cfg, self.p, torch.tensor(noise)
        B, S = tokens.shape
        caches, (h, w) = ([], []), c.grid
        x = p["vlm"]["token_embedding"]["embedding"][torch.tensor(tokens)]
        mean, scale = self.step(x, torch.arange(S)[:, None].expand(S, 3), None, caches)
        u = []
        for n in range(h * w):
            u.append(new := mean + scale * noise[:, n])
            a = p["adapter"]
            hidden = new @ a["in"]["kernel"] + a["in"]["bias"] + a["slot"]["embedding"][n]
            x = torch.nn.functional.gelu(hidden) @ a["out"]["kernel"] + a["out"]["bias"]
            image_in = new @ p["embed_u"]["kernel"] + p["embed_u"]["bias"] + p["embed_slot"]["embedding"][n]
            where = torch.tensor([[S, S + n // w, S + n % w]])
            mean, scale = self.step(x[:, None], where, image_in[:, None], caches)
        z = torch.stack(u, 1)
        for i, block in reversed(list(enumerate(c.shallow_chain))):
            z = self.invert(i, block, z)
        return z

    def invert(self, i: int, block, z):
        """Invert block i of the shallow flow: z (B, N, D) -> h (B, N, D)."""
        p, stack, cache = self.p["shallow"][f"block_{i}"], self.shallow[i], []
        z = z.flip(1) if block.flip else z
        angles = torch.tensor(
            np.asarray(grid_angles(block.grid, block.grid[0], block.transformer.head, block.rotary_theta, None))
        )
        previous, out = p["start_token"].expand(len(z), -1), []
        for n in range(z.shape[1]):
            x = stack((previous @ p["proj_in"]["kernel"] + p["proj_in"]["bias"])[:, None], angles[n : n + 1], cache)
            raw = stack.norm(x[:, 0], p["norm"]["scale"], 1e-6) @ p["proj_out"]["kernel"] + p["proj_out"]["bias"]
            scale, mean = raw.chunk(2, -1)
            previous = mean + torch.nn.functional.softplus(scale + SOFTPLUS_ONE) * z[:, n]
            out.append(previous)
        h = torch.stack(out, 1)
        return h.flip(1) if block.flip else h


def noise_of(sampler: Sampler, count: int) -> np.ndarray:
    """(count, N, D): the noise that row i draws with seed i; its first draw is for <|vision_start|>."""
    N, D = sampler.model.cfg.tokens, sampler.model.cfg.channels

    def one(seed):
        return [jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1 + n), (D,)) for n in range(N)]

    return np.asarray(jax.vmap(lambda seed: jnp.stack(one(seed)))(jnp.arange(count, dtype=jnp.uint32)))


def ours(sampler: Sampler, count: int, jacobi: int) -> np.ndarray:
    """Pixels of `count` images, drawn with seeds 0, 1, ... and `jacobi` tokens solved for at once."""
    N = sampler.model.cfg.tokens
    options = SampleOptions(0, 1, max_tokens=N + 1, image_first=True, jacobi=jacobi, tolerance=1e-3)
    solvers = (Jacobi(jacobi, 1e-3),) * sampler.model.cfg.shallow_blocks if jacobi > 1 else None
    sampler = Sampler(
        sampler.model,
        sampler.params,
        sampler.tokenizer,
        sampler.codec,
        sampler.skips,
        sampler.max_positions,
        sampler.mesh,
        Inversion(solvers),
    )
    session = sampler.session(options, [0])
    session.read([[Text("draw a seven")]])
    session = session.fork([0] * count, range(count))
    return np.stack([part.pixels for [part] in session.write()])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = p.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="a trained model's checkpoint directory")
    model.add_argument("--mid", action="store_true", help="a random model of width 512 instead")
    p.add_argument("--images", type=int, nargs="+", default=[1, 8, 64], help="images of a batch")
    p.add_argument(
        "--jacobi", type=int, nargs="+", default=[1, 4, 8], help="tokens solved for at once; 1: token by token"
    )
    p.add_argument("--repeats", type=int, default=5, help="timed runs")
    p.add_argument("--device", default="cpu", help="PyTorch's device: cpu or cuda")
    a = p.parse_args()
    torch.set_default_device(a.device)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    sampler = mid_size() if a.mid else Sampler.restore(a.checkpoint)
    reference = Reference(sampler)
    text = sampler.encoder([Text("draw a seven")], closed=False)["tokens"].tolist()
    h, w = sampler.model.cfg.grid
    print(jax.devices()[0].device_kind, len(jax.devices()), "devices, jax", jax.__version__)
    print("torch", torch.__version__, "on", a.device)
    for count in a.images:
        tokens, noise = np.array([[*text, sampler.ids.vision_start]] * count), noise_of(sampler, count)

        def theirs(tokens=tokens, noise=noise):
            latents = reference.generate(tokens, noise).cpu().numpy()  # waits for the device
            latents = latents.reshape(len(tokens), h, w, -1)
            return np.asarray(sampler.codec.decode(latents))

        runs = {"reference": theirs} | {
            f"jacobi {c}" if c > 1 else "ours": lambda c=c, n=count: ours(sampler, n, c) for c in a.jacobi
        }
        images = {name: run() for name, run in runs.items()}
        times = {name: [] for name in runs}
        for _ in range(a.repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
        for name in runs:
            ratio = statistics.median(t / m for t, m in zip(times["reference"], times[name], strict=True))
            difference = float(np.abs(images[name] - images["reference"]).max())
            rate = count / statistics.median(times[name])
            found = {"images": count, "what": name, "per_second": round(rate, 2), "ratio": round(ratio, 2)}
            print(json.dumps(found | {"worst_difference": difference}), flush=True)


if __name__ == "__main__":
    main()
