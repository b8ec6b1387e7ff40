"""`starflow2 plan`."""

import json
from pathlib import Path

from starflow2_jax.commands.experiment import add_config
from starflow2_jax.errors import UserError


def add(commands) -> None:
    p = commands.add_parser(
        "plan", help="predict memory and time of a training step on TPUs, without TPUs", allow_abbrev=False
    )
    add_config(p)
    p.add_argument("--topology", required=True, help="TPU slice, such as v5p:4x4x4, v5e:16x16, v6e:16x16 or v4:4x4x4")
    p.add_argument("--stage", help="stage to plan: a name, or 1, 2, 3 (default: the experiment's last stage)")
    p.add_argument("--json", help="also write the plan to this file")
    p.add_argument("--sampler", action="store_true", help="plan steps of the sampler instead of a training step")
    p.add_argument("--rows", type=int, default=0, help="rows of the sampler's batch (default: one per chip)")
    p.add_argument(
        "--capacity", type=int, default=2048, help="positions in each of the sampler's caches (default: 2048)"
    )
    p.add_argument(
        "--search", action="store_true", help="try many numbers of rows, meshes and remat policies, and rank them"
    )
    p.add_argument("--rows-per-chip", default="1,2,4", help="rows per chip that --search tries (default: 1,2,4)")
    p.add_argument("--tensor", default="1,4", help="sizes of the mesh's tensor axis that --search tries (default: 1,4)")
    p.add_argument("--sequence", default="1", help="sizes of the sequence axis that --search tries (default: 1)")
    p.add_argument(
        "--data",
        default="1",
        help="sizes of the data axis that --search tries (default: 1); the fsdp axis gets the remaining chips",
    )
    p.add_argument("--remat", default="full,dots", help="remat policies that --search tries (default: full,dots)")
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
        Path(file).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
