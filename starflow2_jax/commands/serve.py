"""`starflow2 serve`: the HTTP server, from the command line."""

import logging
import os
import re
from pathlib import Path

from starflow2_jax.commands.model import add_model, restore
from starflow2_jax.errors import UserError


def add(commands) -> None:
    p = commands.add_parser(
        "serve", help="serve a model over HTTP, with OpenAI's interface and a web page", allow_abbrev=False
    )
    add_model(p, fsdp=False)
    p.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone); with 0.0.0.0 also set --api-key",
    )
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    p.add_argument("--name", help="name of the model (default: name of the checkpoint directory)")
    p.add_argument("--rows", type=int, default=8, help="answers to write at the same time (default: 8)")
    p.add_argument(
        "--max-queue",
        type=int,
        default=32,
        help="requests that may wait; more are refused with status 429 (default: 32)",
    )
    p.add_argument(
        "--max-tokens", type=int, default=512, help="longest answer in tokens, image tokens included (default: 512)"
    )
    p.add_argument(
        "--max-pixels",
        type=int,
        default=16_000_000,
        help="largest number of pixels in all images of a request (default: 16000000)",
    )
    p.add_argument("--max-body", type=int, default=32_000_000, help="largest request in bytes (default: 32000000)")
    p.add_argument(
        "--grace",
        type=float,
        default=20.0,
        help="seconds that running requests get when the server is stopped (default: 20)",
    )
    p.add_argument(
        "--jacobi",
        type=int,
        default=0,
        help="image tokens to solve for at once (default: as `starflow2 calibrate` measured, or else 1)",
    )
    p.add_argument(
        "--keep",
        type=int,
        default=4,
        help="conversations whose caches are kept; others are read again from their start (default: 4)",
    )
    p.add_argument(
        "--images", choices=("flow", "vit"), default="flow",
        help="how the model sees images of requests that set no `via`: as flow tokens (default), or through its vision "
        "tower, to understand only; models that work on latents always use the vision tower",
    )  # fmt: skip
    p.add_argument(
        "--editing",
        action="store_true",
        help="accept `image_guidance` in requests; caches then take half as much memory again",
    )
    p.add_argument(
        "--api-key",
        default=os.environ.get("STARFLOW2_API_KEY"),
        help="key that clients must send (default: $STARFLOW2_API_KEY, or none)",
    )
    p.set_defaults(run=run)


def run(args, _) -> None:
    names = ("rows", "max_queue", "max_tokens", "max_pixels", "max_body")
    if wrong := [n for n in names if getattr(args, n) < 1]:
        raise UserError(f"--{wrong[0].replace('_', '-')} is at least 1")
    if wrong := [n for n in ("keep", "jacobi") if getattr(args, n) < 0]:
        raise UserError(f"--{wrong[0]} is at least 0")
    if not 0 <= args.grace <= 3600 or not 0 <= args.port < 65536:
        raise UserError("--grace is from 0 to 3600, --port from 0 to 65535")
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        raise UserError("an API key is of visible ASCII characters and has no spaces, for it travels in an HTTP header")
    try:
        from starflow2_jax.serving.server import Limits, Server, end_quietly
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'starflow2_jax[serve]'") from None
    sampler = restore(args, data=1)
    limits = Limits(
        args.rows, args.max_queue, args.max_tokens, args.max_pixels, args.max_body, args.grace, args.jacobi, args.keep,
        args.images, args.editing,
    )  # fmt: skip
    name = args.name or Path(args.checkpoint).resolve().name
    server = Server(
        sampler, name, limits, args.host, args.port, args.api_key,
        ready=lambda address: print(f"serving {name} on {address}", flush=True),
    )  # fmt: skip
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("starflow2_jax").setLevel(logging.INFO)  # what is compiled is told
    server.worker.warm()
    end_quietly()
    server.run()
    if server.worker.lost:
        raise SystemExit("the device has failed for good, the log says why; start the server again")
    print("the server has ended")
