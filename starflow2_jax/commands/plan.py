"""`starflow2 plan`."""

import json
import os
from argparse import Namespace
from pathlib import Path

from starflow2_jax.commands.arguments import Commands, OutputFile, Whole, WholeNumbers, Words
from starflow2_jax.commands.experiment import add_config
from starflow2_jax.errors import UserError


def add(commands: Commands) -> None:
    """Add `starflow2 plan` to the command line."""
    p = commands.add_parser(
        "plan", help="predict memory and time of a training step on TPUs or GPUs that this machine need not have"
    )
    add_config(p)
    p.add_argument(
        "--topology",
        type=Words(),
        required=True,
        metavar="DEVICES",
        help="a TPU slice, such as v5p:4x4x4 or v5e:16x16, several slices, such as v6e:16x16:4, or GPUs, such as "
        "h200:1, h100:8 or h100:8x8 (nodes x GPUs)",
    )
    p.add_argument(
        "--stage", type=Words(), help="stage to plan: a name, or 1, 2, 3 (default: the experiment's last stage)"
    )
    p.add_argument(
        "--codec",
        type=Words(),
        metavar="CODEC",
        help="folder of a codec, or an experiment that trains one: plan a step that encodes its pictures with this "
        "codec, or with --sampler also the making of pictures (default: latents are read)",
    )
    p.add_argument("--json", type=OutputFile(), metavar="FILE", help="also write the plan to this file")
    p.add_argument("--sampler", action="store_true", help="plan steps of the sampler instead of a training step")
    p.add_argument(
        "--rows", type=Whole(1, 10**6), metavar="N", help="with --sampler: rows of the batch (default: one per chip)"
    )
    p.add_argument(
        "--capacity",
        type=Whole(1, 10**7),
        default=2048,
        metavar="N",
        help="with --sampler: positions in each of the caches (default: 2048)",
    )
    p.add_argument(
        "--search", action="store_true", help="try many numbers of rows, meshes and remat policies, and rank them"
    )
    numbers = dict(type=WholeNumbers(), metavar="N,N")
    p.add_argument("--rows-per-chip", **numbers, default="1,2,4", help="with --search: rows per chip (default: 1,2,4)")
    p.add_argument("--tensor", **numbers, default="1,4", help="with --search: sizes of the tensor axis (default: 1,4)")
    p.add_argument("--sequence", **numbers, default="1", help="with --search: sizes of the sequence axis (default: 1)")
    p.add_argument(
        "--data",
        **numbers,
        default="1",
        help="with --search: sizes of the data axis (default: 1); the fsdp axis gets the remaining chips",
    )
    p.add_argument(
        "--remat", type=Words(), default="full,dots", help="with --search: remat policies (default: full,dots)"
    )
    p.set_defaults(run=_plan)


def _plan(args: Namespace, overrides: list[str]) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; the devices are only described
    from starflow2_jax.config import loading as configs
    from starflow2_jax.parallel import hardware
    from starflow2_jax.planning import compiling, plan, report
    from starflow2_jax.planning.codec import planned_codec
    from starflow2_jax.training.program import find_codec_stage, find_stage

    topology = hardware.parse_topology(args.topology)
    config = configs.load(args.config, overrides, chip=args.chip, kinds=tuple(configs.PAGES))
    if config.kind == configs.CODEC:
        if args.search or args.sampler or args.codec:
            raise UserError(
                "--search, --sampler and --codec are for experiments of STARFlow2; leave them out for a codec's"
            )
        stage = find_codec_stage(config, args.stage)
        plans = [plan.plan_codec_step(config, stage, topology, compiling.described_devices(topology))]
    else:
        stage = find_stage(config, args.stage)
        codec = planned_codec(config, args.codec) if args.codec else None
        devices = compiling.described_devices(topology)
        if args.search:
            return _search(args, config, stage, topology, devices)
        if args.sampler:
            rows = args.rows or topology.chips
            plans = plan.plan_sampler(config, stage, topology, devices, rows, args.capacity)
            plans += [plan.plan_decoder(config, codec, topology, devices, rows)] if codec else []
        else:
            plans = [plan.plan_step(config, stage, topology, devices, codec)]
    print("\n\n".join(map(report.text, plans)))
    _write(args.json, [p.json() for p in plans])


def _search(args, config, stage, topology, devices) -> None:
    from starflow2_jax.planning import plan, search

    axes = (args.tensor, args.remat.split(","), args.sequence, args.data)
    choices = list(search.candidates(topology.chips, args.rows_per_chip, *axes))
    ranked = search.search(config, stage, choices, lambda c: plan.plan_step(c, stage, topology, devices), print)
    print(search.table(ranked))
    _write(args.json, [{"choice": c.names(), "failure": c.failure, "plan": c.plan and c.plan.json()} for c in ranked])


def _write(file: str | None, values: list[dict]) -> None:
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
