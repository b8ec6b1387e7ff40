"""Measures the peak memory of converting Qwen2.5-VL's weights, and of restoring and saving them on eight devices.

python benchmarks/convert.py --size 3b --layers 12 --folder /tmp/convert_benchmark

It makes a folder of random bfloat16 tensors in the published layout, with `--layers` layers. Each step runs in a
process of its own. The folder is removed at the end. docs/benchmarks/convert.md holds the numbers.
"""

import argparse
import dataclasses
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GB = 1e9


def peak() -> float:
    """The most resident memory that this process has had so far, in GB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / GB


def make(folder: Path, size: str, layers: int) -> None:
    """Write a folder of random weights as the reference publishes them, in files of 2 GB."""
    from starflow2_jax.models.vlm import abstract_params
    from starflow2_jax.weights import qwen
    from starflow2_jax.weights.folder import write_folder
    from starflow2_jax.weights.table import expected, source_shape

    cfg = dataclasses.replace(qwen.QWEN2_5_VL[size], layers=layers)
    assert cfg.vision is not None, "the published sizes have a vision tower"
    wanted, _ = expected(qwen.table(cfg), abstract_params(cfg))
    shapes = {name: source_shape(*parts) for name, parts in wanted.items()}
    random = np.random.default_rng(0)

    def tensor(name: str) -> np.ndarray:
        bits = random.integers(0, 2**16, shapes[name], np.uint16, endpoint=False)
        bits &= 0xBFFF  # with this bit clear a number is finite
        return bits.view(ml_dtypes.bfloat16)

    folder.mkdir(parents=True)
    write_folder(folder, shapes, dict.fromkeys(shapes, np.dtype(ml_dtypes.bfloat16)), tensor, 2 * 10**9)
    vision = dict(
        depth=cfg.vision.layers,
        hidden_size=cfg.vision.width,
        intermediate_size=cfg.vision.mlp_hidden,
        num_heads=cfg.vision.heads,
        out_hidden_size=cfg.width,
    )
    config = dict(
        model_type="qwen2_5_vl",
        vocab_size=cfg.vocabulary,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_hidden,
        num_hidden_layers=layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rotary_theta,
        tie_word_embeddings=cfg.tied_head,
        rope_scaling=dict(type="mrope", mrope_section=cfg.rotary_sections),
        vision_config=vision,
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def command(*arguments: str) -> None:
    """Run `starflow2 convert qwen2_5_vl`; exits if it fails."""
    from starflow2_jax.cli import main

    if main(["convert", "qwen2_5_vl", *arguments]):
        raise SystemExit("the conversion failed")


def compare(a: Path, b: Path) -> None:
    """Compare two folders of weights bit for bit; exits if they differ."""
    from starflow2_jax.weights.folder import read_entries, same_bits

    first, second = read_entries(a), read_entries(b)
    if set(first) != set(second) or not all(same_bits(x, second[name]) for name, x in first.items()):
        raise SystemExit(f"the tensors in {b} differ from those in {a}")


def place(checkpoint: Path, saved: Path | None) -> None:
    """Restore onto eight CPU devices, with the check of the content hash; save again to `saved`."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", 8)
    from starflow2_jax.checkpoints.directory import CheckpointDirectory
    from starflow2_jax.models.vlm import abstract_params
    from starflow2_jax.parallel import sharding
    from starflow2_jax.weights.vlm import load_config

    tree = abstract_params(load_config(checkpoint / "vlm.json"))
    tree = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), tree)
    frozen = CheckpointDirectory(checkpoint).frozen.restore(sharding.abstract(tree, sharding.make_mesh(data=1, fsdp=8)))
    jax.block_until_ready(frozen)
    if saved:
        saved.mkdir()
        CheckpointDirectory(saved).frozen.save(frozen)


def _report(pipe: Any, step: Callable[..., None], arguments: tuple) -> None:
    """Run a step and send its seconds and this process's peak memory."""
    begin = time.time()
    step(*arguments)
    pipe.send((time.time() - begin, peak()))


def measure(name: str, step: Callable[..., None], *arguments: Any) -> None:
    """Run a step in a new process; print its seconds and its peak memory."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_report, args=(there, step, arguments))
    process.start()
    there.close()
    seconds, memory = here.recv()
    process.join()
    print(f"{name}: {seconds:.0f} s, peak resident memory {memory:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b", help="a published size: a key of weights/qwen.py's QWEN2_5_VL")
    parser.add_argument("--layers", type=int, default=12, help="layers of the text decoder")
    parser.add_argument(
        "--folder", type=Path, required=True, help="a new folder; it takes three times the model's size"
    )
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True)
    try:
        measure("make", make, folder / "hf", args.size, args.layers)
        from starflow2_jax.weights.folder import read_entries

        sizes = {name: entry.nbytes / GB for name, entry in read_entries(folder / "hf").items()}
        largest = max(sizes, key=lambda name: sizes[name])
        print(f"model {sum(sizes.values()):.2f} GB; largest tensor {largest} {sizes[largest]:.2f} GB")
        measure("convert --to", command, "--from", str(folder / "hf"), "--to", str(folder / "checkpoint"))
        measure("convert --to-hf", command, "--from", str(folder / "checkpoint"), "--to-hf", str(folder / "back"))
        measure("compare bit for bit", compare, folder / "hf", folder / "back")
        shutil.rmtree(folder / "back")
        measure("restore on 8 devices", place, folder / "checkpoint", None)
        measure("restore on 8 devices and save", place, folder / "checkpoint", folder / "saved")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
