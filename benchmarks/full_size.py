"""Measures writing at full size: milliseconds per token beside their lower limit, and seconds per image with guidance.

    python benchmarks/full_size.py                                  # 7B + 3.6B, one GPU of 80 GB
    python benchmarks/full_size.py --rows 1 8 --jacobi 8 64 256
    python benchmarks/full_size.py --runlocal                       # small, for a look at the path on any machine

The weights are random and bfloat16, without the vision tower, which writing does not use. The limit is the time in
which the device reads all bytes that a token needs, at the bandwidth with which it sums a large bfloat16 array. These
bytes are the matrices of the VLM, the deep flow and their connections, once for all rows; the text head, for a text
token; and the filled part of the caches. A token reads one row of the embedding tables, which is left out. The shallow
flow runs once for each image; the seconds per image include it. A random model's number of Jacobi passes says little
about a trained model's. Each measurement is one line of JSON; numbers are medians.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from starflow2_jax.config import loading as configs
from starflow2_jax.config.schema import Config
from starflow2_jax.data import digits, sources
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.data.documents import Text
from starflow2_jax.models.jacobi import Jacobi, Schedule
from starflow2_jax.models.pretzel import Pretzel, for_sampling, init_params
from starflow2_jax.parallel.sharding import path_name
from starflow2_jax.sampling.engine import SampleOptions, Sampler, in_type, weights_in_type
from starflow2_jax.sampling.session import Session

EXPERIMENT = Path(__file__).parents[1] / "starflow2_jax/experiments/starflow2_7b_gpu.py"
PROMPT = [Text("draw a seven")]


def random_sampler(config: Config) -> Sampler:
    """A sampler with random bfloat16 weights; each array is made on the device in its type, never in fp32 first."""
    cfg = for_sampling(in_type(configs.pretzel(config), "bfloat16"))
    model = Pretzel(replace(cfg, vlm=replace(cfg.vlm, vision=None)))
    shapes = jax.eval_shape(lambda: weights_in_type(init_params(model, jax.random.key(0)), "bfloat16"))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def leaf(path, x):
        name = path_name(path)
        if name.endswith("scale"):  # of a norm: x w in the VLM, x (1 + w) elsewhere
            return jnp.full(x.shape, name.startswith("vlm"), x.dtype)
        return normal(next(keys), x.shape, x.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    tokenizer = tokenizers.train(digits.texts(), 416)  # any tokenizer with the special tokens does
    return Sampler(model, params, tokenizer, sources.make_codec(config), max_positions=config.max_positions)


@partial(jax.jit, static_argnums=(1, 2))
def normal(key, shape: tuple[int, ...], dtype) -> jax.Array:
    """Random weights with standard deviation 0.02."""
    return 0.02 * jax.random.normal(key, shape, dtype)


def size(tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def read_bytes(params: dict) -> dict[str, int]:
    """Bytes of weights that an image token and a text token must read."""
    groups = {name: group for name, group in params.items() if name != "shallow"}
    leaves = [(path_name(path), x.nbytes) for path, x in jax.tree_util.tree_leaves_with_path(groups)]
    image = sum(count for name, count in leaves if not name.endswith("embedding"))
    vlm = params["vlm"]
    return {"image": image, "text": image + size(vlm.get("lm_head", vlm["token_embedding"]))}


def bandwidth(megabytes: int, repeats: int) -> float:
    """Bytes per second at which the device sums a bfloat16 array of this size."""
    x = jnp.ones(megabytes * 500_000, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return x.nbytes / median_seconds(lambda: jax.block_until_ready(total(x)), repeats)


def median_seconds(run, repeats: int) -> float:
    """Median seconds of `repeats` runs, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def write(sampler: Sampler, options: SampleOptions, rows: int, repeats: int) -> tuple[float, Session]:
    """The median seconds of writing an answer, without reading its prompt, and a session that has written one."""
    prompt = sampler.session(options, [0])
    prompt.read([PROMPT], room=prompt.to_write[0])
    turns = [prompt.fork([0] * rows, range(rows)) for _ in range(repeats + 1)]
    jax.block_until_ready([turn.rows for turn in turns])
    waiting = iter(turns)

    def run():
        for _ in next(waiting).advance(every=None):
            pass

    return median_seconds(run, repeats), turns[-1]


def token(sampler: Sampler, kind: str, options: SampleOptions, rows: int, rate: float, repeats: int) -> dict:
    """Milliseconds per token when `rows` rows write together, and their limit.

    `rate`: bandwidth in bytes per second.
    """
    seconds, session = write(sampler, options, rows, repeats)
    count = int(session.rows.count.max())
    filled = float(session.rows.caches.length.mean()) - count / 2  # filled positions halfway through the answer
    caches = size(session.rows.caches) * filled / session.rows.caches.capacity
    mine, limit = 1e3 * seconds / count, 1e3 * (read_bytes(sampler.params)[kind] + caches) / rate
    found = {"token": kind, "rows": rows, "milliseconds": round(mine, 3), "limit": round(limit, 3)}
    return found | {"ratio": round(mine / limit, 2), "tokens": count, "cache_bytes": round(caches)}


def image(sampler: Sampler, chunk: int, guidance: float, tolerance: float, repeats: int) -> dict:
    """Seconds from a read prompt to an image's latents, with `chunk` tokens solved for at once in both flows."""
    cfg = sampler.model.cfg
    options = SampleOptions(
        guidance=guidance, max_tokens=cfg.tokens + 1, image_first=True, jacobi=chunk, tolerance=tolerance
    )
    streams, session = write(sampler, options, 1, repeats)
    schedule = (Jacobi(chunk, tolerance),) * cfg.shallow_blocks
    u = session.rows.u[:, 1 : cfg.tokens + 1]

    def run():
        return jax.block_until_ready(sampler.run(decode, sampler.model, schedule, sampler.params, u))

    shallow, (_, passes) = median_seconds(run, repeats), run()
    found = {"image_tokens": cfg.tokens, "guidance": guidance, "chunk": chunk, "seconds": round(streams + shallow, 4)}
    found |= {"streams": round(streams, 4), "shallow_flow": round(shallow, 4)}
    read = 1 + 1  # passes over the prompt and <|vision_start|>
    return found | {"passes": int(session.rows.passes[0]) - read, "passes_shallow_flow": int(passes)}


@partial(jax.jit, static_argnums=(0, 1))
def decode(model: Pretzel, schedule: Schedule, params: dict, u: jax.Array):
    """Invert the shallow flow as the sampler does: the latents, and the number of passes."""
    latents, sown = model.apply({"params": params}, u, schedule, method=Pretzel.decode, mutable="inversion")
    return latents, sum(passes.sum() for passes in jax.tree.leaves(sown))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default=str(EXPERIMENT), help="an experiment file")
    p.add_argument("--runlocal", action="store_true", help="use the experiment's small version")
    p.add_argument("--rows", type=int, nargs="+", default=[1], help="rows that write together")
    p.add_argument("--tokens", type=int, default=64, help="tokens of a text")
    p.add_argument(
        "--jacobi", type=int, nargs="+", default=[8, 32, 128], help="image tokens solved for at once, besides 1"
    )
    p.add_argument("--guidance", type=float, default=1.0, help="guidance weight of the images")
    p.add_argument("--tolerance", type=float, default=1e-3, help="tolerance of the Jacobi passes")
    p.add_argument("--megabytes", type=int, default=4000, help="size of the array whose sum measures the bandwidth")
    p.add_argument("--repeats", type=int, default=5, help="timed runs")
    a = p.parse_args()
    rate = bandwidth(a.megabytes, a.repeats)
    sampler = random_sampler(configs.load(a.config, [] if a.runlocal else ["codec.kind=latents"], a.runlocal))
    found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "bandwidth": round(rate)}
    groups = {name: sum(x.size for x in jax.tree.leaves(group)) for name, group in sampler.params.items()}
    weights = {"parameters": groups, "weight_bytes": size(sampler.params)}
    print(json.dumps(found | weights | {"read_bytes": read_bytes(sampler.params)}), flush=True)
    kinds = {
        "text": SampleOptions(max_tokens=a.tokens, max_images=0),
        "image": SampleOptions(max_tokens=sampler.model.cfg.tokens + 1, image_first=True, jacobi=1),
    }
    for rows in a.rows:
        for kind, options in kinds.items():
            print(json.dumps(token(sampler, kind, options, rows, rate, a.repeats)), flush=True)
    for chunk in [1, *a.jacobi]:
        print(json.dumps(image(sampler, chunk, a.guidance, a.tolerance, a.repeats)), flush=True)


if __name__ == "__main__":
    main()
