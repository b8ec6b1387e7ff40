"""`starflow2 convert`."""

import os
from argparse import Namespace

from starflow2_jax.commands.arguments import Commands, InputPath, Number, OutputFolder, Words
from starflow2_jax.errors import UserError, require_one_of

RAE = "rae"  # RAE's autoencoders become codecs


def add(commands: Commands) -> None:
    """Add `starflow2 convert` to the command line."""
    p = commands.add_parser("convert", help="convert published weights to a checkpoint, or back")
    p.add_argument(
        "kind",
        type=Words(),
        help="kind of vision-language model, such as qwen2_5_vl, or rae; a wrong one is answered with the list",
    )
    p.add_argument(
        "--from",
        dest="source",
        type=InputPath(),  # the converter says what a file is and what to give instead
        required=True,
        metavar="DIR",
        help="folder with the published weights; with --to-hf, a checkpoint that this command wrote",
    )
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument(
        "--to", type=OutputFolder(), metavar="DIR", help="new folder for the frozen VLM, or of rae for the codec"
    )
    to.add_argument(
        "--to-hf", type=OutputFolder(), metavar="DIR", help="new folder for safetensors files in the published layout"
    )
    p.add_argument(
        "--shard-gb",
        type=Number(1e-6),
        default=4.0,
        metavar="GB",
        help="with --to-hf: size of the largest safetensors file, in GB (default: 4)",
    )
    p.set_defaults(run=_convert)


def _convert(args: Namespace, _: list[str]) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # converting only reads and writes files
    from starflow2_jax.weights import convert, rae
    from starflow2_jax.weights.vlm import VLM_WEIGHTS

    require_one_of("the kind of weights", args.kind, (*VLM_WEIGHTS, RAE))
    if args.kind == RAE:
        if args.to_hf:
            raise UserError(
                "--to-hf writes vision-language models only; a codec folder holds a safetensors file already"
            )
        rae.to_codec(args.source, args.to)
    elif args.to:
        convert.to_checkpoint(args.kind, args.source, args.to)
    else:
        convert.to_reference(args.kind, args.source, args.to_hf, int(args.shard_gb * 10**9))
    print(f"written: {args.to or args.to_hf}")
