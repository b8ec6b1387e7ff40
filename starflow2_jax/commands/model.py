"""Options of all commands that load a model: its checkpoint, its number type, and how it is split over devices."""

import argparse
from typing import TYPE_CHECKING

from starflow2_jax.commands.arguments import InputFolder, Whole

if TYPE_CHECKING:
    from starflow2_jax.data.images import ImageReader
    from starflow2_jax.sampling.engine import Sampler

SEED = Whole(0, 2**32 - 1)


def add_model(parser: argparse.ArgumentParser, fsdp: bool = True) -> None:
    """Add --checkpoint, --dtype, --tensor and, if `fsdp`, --fsdp, which a server does not take: its rows come one by
    one.
    """
    parser.add_argument(
        "--checkpoint",
        type=InputFolder("checkpoint directory"),
        required=True,
        metavar="DIR",
        help="checkpoint directory of a training run",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="number type of matrices and caches (default: as in training)"
    )
    if fsdp:
        parser.add_argument(
            "--fsdp",
            type=Whole(1),
            default=1,
            metavar="N",
            help="number of devices to split parameters and rows over (default: 1)",
        )
    else:
        parser.set_defaults(fsdp=1)
    parser.add_argument(
        "--tensor",
        type=Whole(1),
        default=1,
        metavar="N",
        help="number of devices to split heads, hidden channels and the vocabulary over (default: 1)",
    )


def image_reader(args: argparse.Namespace) -> "ImageReader":
    """Reads images for the checkpoint's model. This needs no device, so images can be read before the model is loaded.

    Raises CheckpointError.
    """
    from starflow2_jax.checkpoints.directory import CheckpointDirectory
    from starflow2_jax.data.images import reader_of

    checkpoint = CheckpointDirectory(args.checkpoint)
    checkpoint.config()
    return reader_of(checkpoint.codec())


def restore(args: argparse.Namespace, data: int = -1) -> "Sampler":
    """The sampler of `args.checkpoint`, with `data` copies of the model; -1: as many as the devices hold. Raises
    UserError.
    """
    from starflow2_jax.checkpoints.directory import CheckpointDirectory
    from starflow2_jax.parallel import devices
    from starflow2_jax.parallel.sharding import make_mesh
    from starflow2_jax.sampling.engine import Sampler

    CheckpointDirectory(args.checkpoint).config()  # refuses a wrong folder before the devices start
    found = devices.start()
    used = found if data < 0 else found[: data * args.fsdp * args.tensor]
    return Sampler.restore(args.checkpoint, make_mesh(data, args.fsdp, args.tensor, used), args.dtype)
