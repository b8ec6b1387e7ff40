"""What the commands that run a checkpoint take: where it lies, over which devices it is cut, in which type it runs."""

from starflow2_jax.errors import UserError


def add_model(parser, fsdp: bool = True) -> None:
    """`fsdp`: whether rows can be cut, too; a server's come one by one."""
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of matrices and caches (default: the config's)"
    )
    if fsdp:
        parser.add_argument("--fsdp", type=int, default=1, help="devices that parameters and rows are cut over")
    else:
        parser.set_defaults(fsdp=1)
    parser.add_argument(
        "--tensor", type=int, default=1, help="devices that heads, hidden channels and words are cut over"
    )


def restore(args, data: int = -1):
    """The Sampler, with `data` copies of the model (-1: as many as there are devices for). Raises UserError."""
    import jax

    from starflow2_jax.parallel.sharding import make_mesh
    from starflow2_jax.sampling.engine import Sampler

    if wrong := [name for name in ("fsdp", "tensor") if getattr(args, name) < 1]:
        raise UserError(f"--{wrong[0]} is at least 1")
    devices = jax.devices() if data < 0 else jax.devices()[: data * args.fsdp * args.tensor]
    return Sampler.restore(args.checkpoint, make_mesh(data, args.fsdp, args.tensor, devices), args.dtype)
