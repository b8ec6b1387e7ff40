"""plan."""

import json
from pathlib import Path

from starflow2_jax.commands.experiment import add_config
from starflow2_jax.errors import UserError


def add(commands) -> None:
    p = commands.add_parser("plan", help="what a training step needs of a TPU that is not there", allow_abbrev=False)
    add_config(p)
    p.add_argument("--topology", required=True, help="such as v5p:4x4x4, v5e:16x16, v6e:16x16, v4:4x4x4")
    p.add_argument("--stage", help="its name, or 1, 2, 3 (default: the last of the config's order)")
    p.add_argument("--json", help="file to write the plan to, too")
    p.add_argument("--sampler", action="store_true", help="plan the sampler's steps instead")
    p.add_argument("--rows", type=int, default=0, help="of the sampler (default: one a chip)")
    p.add_argument("--capacity", type=int, default=2048, help="positions that the sampler's caches have room for")
    p.add_argument("--search", action="store_true", help="try rows, meshes and remat policies, and rank them")
    p.add_argument("--rows-per-chip", default="1,2,4", help="that --search tries")
    p.add_argument("--tensor", default="1,4", help="sizes of the tensor axis that --search tries")
    p.add_argument("--sequence", default="1", help="sizes of the sequence axis that --search tries")
    p.add_argument(
        "--data", default="1", help="sizes of the data axis that --search tries; fsdp gets the chips that are left"
    )
    p.add_argument("--remat", default="full,dots", help="policies that --search tries")
    p.set_defaults(run=_plan)


def _plan(args, overrides) -> None:
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; the TPU is only described
    from starflow2_jax.config import loading as configs
    from starflow2_jax.parallel import hardware
    from starflow2_jax.planning import compiling, plan, report
    from starflow2_jax.training.program import find_stage

    topology = hardware.parse_topology(args.topology)
    config = configs.load(args.config, overrides, chip=args.chip)
    stage = find_stage(config, args.stage)
    devices = compiling.tpu_devices(topology)
    if args.search:
        return _search(args, config, stage, topology, devices)
    if args.sampler:
        plans = plan.plan_sampler(config, stage, topology, devices, args.rows or topology.chips, args.capacity)
    else:
        plans = [plan.plan_step(config, stage, topology, devices)]
    print("\n\n".join(map(report.text, plans)))
    _write(args.json, [p.json() for p in plans])


def _search(args, config, stage, topology, devices) -> None:
    from starflow2_jax.planning import plan, search

    rows, tensors, sequences, datas = (_numbers(args, name) for name in ("rows_per_chip", "tensor", "sequence", "data"))
    choices = list(search.candidates(topology.chips, rows, tensors, args.remat.split(","), sequences, datas))
    ranked = search.search(config, stage, choices, lambda c: plan.plan_step(c, stage, topology, devices), print)
    print(search.table(ranked))
    _write(args.json, [{"choice": c.names(), "failure": c.failure, "plan": c.plan and c.plan.json()} for c in ranked])


def _numbers(args, name: str) -> list[int]:
    text = getattr(args, name)
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--{name.replace('_', '-')} takes whole numbers such as 1,2,4, not {text!r}")
    return numbers


def _write(file: str | None, values: list[dict]) -> None:
    if file:
        Path(file).write_text(json.dumps(values, indent=1) + "\n")
