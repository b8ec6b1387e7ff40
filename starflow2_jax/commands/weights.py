"""`starflow2 convert`."""

import os


def add(commands) -> None:
    p = commands.add_parser("convert", help="convert published weights to a checkpoint, or back", allow_abbrev=False)
    p.add_argument("kind", help="kind of vision-language model; an unknown name is answered with the list")
    p.add_argument(
        "--from", dest="source", required=True, help="folder with the published weights; with --to-hf, a checkpoint"
    )
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument("--to", help="new checkpoint directory for the frozen VLM")
    to.add_argument("--to-hf", help="new folder for safetensors files in the published layout")
    p.add_argument(
        "--shard-gb", type=float, default=4.0, help="with --to-hf: largest safetensors file, in GB (default: 4)"
    )
    p.set_defaults(run=_convert)


def _convert(args, _) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it is all reading and writing
    from starflow2_jax.weights import convert

    if args.to:
        convert.to_checkpoint(args.kind, args.source, args.to)
    else:
        convert.to_reference(args.kind, args.source, args.to_hf, int(args.shard_gb * 10**9))
    print(f"written: {args.to or args.to_hf}")
