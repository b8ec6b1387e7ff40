"""Compares XLA's options for CPUs by the time of a training step of the digits model, and PyTorch's with them.

    python benchmarks/cpu_options.py --isa AVX2 --repeats 15                         # the joint stage, with Muon
    python benchmarks/cpu_options.py --isa AVX2 --stage text_to_image --torch        # beside PyTorch, with AdamW

Each option has a process of its own, since XLA reads its flags when it starts. The processes take turns, one step each,
so that other work on the machine disturbs all alike. Processor time, of all threads, is disturbed least. --isa AVX2
keeps XLA, oneDNN, MKL and PyTorch from AVX-512; YNNPACK and XNNPACK look at the CPU itself, so their options mean
nothing with it on a machine that has AVX-512.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import train

from starflow2_jax.config import loading as configs

# Name -> XLA's flags, and CPU devices for two cores.
OPTIONS = {
    "default": ("", 2),
    "all instructions": ("", 2),
    "one device": ("", 1),
    "fast math": ("--xla_cpu_enable_fast_math=true", 2),
    "fast min and max": ("--xla_cpu_enable_fast_min_max=true", 2),
    "no threads in products": ("--xla_cpu_multi_thread_eigen=false", 2),
    "vectors of 512 bits": ("--xla_cpu_prefer_vector_width=512", 2),
    "scheduler for concurrency": ("--xla_cpu_enable_concurrency_optimized_scheduler=true", 2),
    "YNN: no fusions": ("--xla_cpu_experimental_ynn_fusion_type=", 2),
    "YNN: products": ("--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", 2),
    "YNN: products, elementwise, sums": (
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE",
        2,
    ),
}
TORCH, FREE = "PyTorch", "all instructions"  # the latter: default without --isa


def environment(flags: str, isa: str) -> dict[str, str]:
    """The variables of a process with these flags, and with instructions up to `isa` ("": all)."""
    if not isa:
        return os.environ | {"XLA_FLAGS": flags}
    limits = dict.fromkeys(("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"), isa)
    return os.environ | limits | {"ATEN_CPU_CAPABILITY": isa.lower(), "XLA_FLAGS": f"--xla_cpu_max_isa={isa} {flags}"}


def work(stage: str, devices: int, with_torch: bool) -> None:
    """In a process of its own: prepare a step, then take one for each line of the input and print its milliseconds
    of processor time."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from starflow2_jax.benchmarks.program import build

    overrides = ["stages.text_to_image.optimizer.name=adamw"] if stage == "text_to_image" else []
    config = configs.load("digits_quick", overrides)
    with tempfile.TemporaryDirectory() as folder:
        ours = build(config, stage, folder)
    run = ours.run
    if with_torch:
        train.torch.set_num_threads(2)
        reference = train.Reference(config, ours.trainer.codec.std, ours.state.params, ours.frozen)
        batch = train.torch_batch(ours.batch, config.model)

        def run() -> None:
            reference.step(batch)

    for _ in range(2):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        run()
        print(1e3 * (time.process_time() - begin), flush=True)


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", default="joint", help="stage of digits_quick (default: joint)")
    p.add_argument("--isa", default="", help="the newest instructions that may be used, such as AVX2 (default: all)")
    p.add_argument("--torch", action="store_true", help="PyTorch, too; needs --stage text_to_image")
    p.add_argument("--only", nargs="+", default=OPTIONS, choices=OPTIONS, help="these options alone")
    p.add_argument("--repeats", type=int, default=15, help="timed steps")
    p.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work is not None:
        return work(args.stage, args.work, args.torch)
    chosen = {name: (*OPTIONS[name], []) for name in args.only} | ({TORCH: ("", 1, ["--torch"])} if args.torch else {})
    processes = {}
    for name, (flags, devices, more) in chosen.items():
        command = [sys.executable, __file__, "--stage", args.stage, "--work", str(devices), *more]
        process = subprocess.Popen(
            command,
            env=environment(flags, "" if name == FREE else args.isa),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if process.stdout.readline() != "ready\n":
            print(f"{name}: did not start", file=sys.stderr)
            continue
        processes[name] = process

    used: dict[str, list[float]] = {name: [] for name in processes}

    def step(name: str) -> None:
        print(file=processes[name].stdin, flush=True)
        used[name].append(float(processes[name].stdout.readline()))

    found = train.alternate({name: functools.partial(step, name) for name in processes}, args.repeats)
    for name, times in used.items():
        found[name]["processor time, median"] = round(statistics.median(times), 1)
    print(json.dumps(vars(args) | {"only": list(processes)}))
    print(json.dumps(found, indent=1))
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
