"""`starflow2 serve`: the HTTP server, from the command line."""

import logging
import os
import re
from pathlib import Path

from starflow2_jax.commands.model import add_model, restore
from starflow2_jax.errors import UserError


def add(commands) -> None:
    p = commands.add_parser("serve", help="an HTTP server with OpenAI's interface, and a page", allow_abbrev=False)
    add_model(p, fsdp=False)
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine; then give a key")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--name", help="of the model (default: the checkpoint's folder)")
    p.add_argument("--rows", type=int, default=8, help="answers written at once")
    p.add_argument("--max-queue", type=int, default=32, help="requests that may wait")
    p.add_argument("--max-tokens", type=int, default=512, help="positions of an answer at most, image tokens included")
    p.add_argument("--max-pixels", type=int, default=16_000_000, help="of a request's images together")
    p.add_argument("--max-body", type=int, default=32_000_000, help="bytes of a request")
    p.add_argument("--grace", type=float, default=20.0, help="seconds that running requests have at the end")
    p.add_argument("--jacobi", type=int, default=0, help="image tokens solved for at once; 0: as calibrated, else 1")
    p.add_argument(
        "--keep", type=int, default=4, help="conversations that go on from their caches; 0: each is read anew"
    )
    p.add_argument(
        "--images", choices=("flow", "vit"), default="flow",
        help="how images are seen that do not say `via`; by vit where the model's own are latents",
    )  # fmt: skip
    p.add_argument("--editing", action="store_true", help="take image_guidance, which needs half as much cache again")
    p.add_argument("--api-key", default=os.environ.get("STARFLOW2_API_KEY"), help="(default: $STARFLOW2_API_KEY)")
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
