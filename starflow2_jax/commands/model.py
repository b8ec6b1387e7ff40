"""Options of all commands that load a model: its checkpoint, its number type, and how it is split over devices."""

from starflow2_jax.errors import UserError


def add_model(parser, fsdp: bool = True) -> None:
    """`fsdp`: whether the command takes --fsdp. A server does not, because its rows come one by one."""
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="number type of matrices and caches (default: as in training)"
    )
    if fsdp:
        parser.add_argument(
            "--fsdp", type=int, default=1, help="number of devices to split parameters and rows over (default: 1)"
        )
    else:
        parser.set_defaults(fsdp=1)
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="number of devices to split heads, hidden channels and the vocabulary over (default: 1)",
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
