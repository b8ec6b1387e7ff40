"""`starflow2 serve`."""

import logging
import os
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from starflow2_jax.commands.arguments import Commands, Number, Whole, Words
from starflow2_jax.commands.model import add_model, restore
from starflow2_jax.commands.sampling_options import add_images, add_sampling
from starflow2_jax.errors import UserError


def add(commands: Commands) -> None:
    """Add `starflow2 serve` to the command line."""
    p = commands.add_parser("serve", help="serve a model over HTTP, with OpenAI's interface and a web page")
    add_model(p, fsdp=False)
    _add_address(p)
    _add_limits(p)
    add_sampling(p, ("jacobi",))
    _add_images(p)
    p.set_defaults(run=run)


def _add_address(p: ArgumentParser) -> None:
    """Where the server listens, and who may use it."""
    p.add_argument(
        "--host",
        type=Words(),
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone); with 0.0.0.0 also set --api-key",
    )
    p.add_argument(
        "--port",
        type=Whole(0, 65535),
        default=8000,
        metavar="N",
        help="port to listen on; 0 takes a free one (default: 8000)",
    )
    p.add_argument(
        "--name", type=Words(), help="name of the model in requests (default: name of the checkpoint directory)"
    )
    p.add_argument(
        "--api-key",
        type=Words(),
        metavar="KEY",
        help="key that clients must send (default: $STARFLOW2_API_KEY, or none)",
    )
    p.add_argument(
        "--allow-origin",
        type=Words(),
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web site whose pages may use the server, such as https://example.com; * is every site; may be repeated",
    )


def _add_limits(p: ArgumentParser) -> None:
    """How much the server does and keeps at the same time."""
    p.add_argument(
        "--rows",
        type=Whole(1, 10**4),
        default=8,
        metavar="N",
        help="number of answers to write at the same time (default: 8)",
    )
    p.add_argument(
        "--max-queue",
        type=Whole(1),
        default=512,
        metavar="N",
        help="requests that may wait; more are refused with status 429 (default: 512)",
    )
    p.add_argument(
        "--max-tokens",
        type=Whole(1),
        default=512,
        metavar="N",
        help="longest answer in tokens, image tokens included (default: 512)",
    )
    p.add_argument(
        "--max-body",
        type=Whole(1, 10**12),
        default=32_000_000,
        metavar="BYTES",
        help="largest request in bytes (default: 32000000)",
    )
    p.add_argument(
        "--grace",
        type=Number(0, 3600),
        default=20.0,
        metavar="SECONDS",
        help="seconds that running requests get when the server is stopped (default: 20)",
    )
    p.add_argument(
        "--keep",
        type=Whole(0),
        default=4,
        metavar="N",
        help="number of conversations whose caches are kept; others are read again from their start (default: 4)",
    )


def _add_images(p: ArgumentParser) -> None:
    """Pictures in requests and in answers."""
    p.add_argument(
        "--max-pixels",
        type=Whole(1),
        default=40_000_000,
        metavar="N",
        help="most pixels of an image as its file is decoded, beside those before it as the model sees them; larger "
        "JPEG files are decoded at a lower resolution (default: 40000000)",
    )
    for name, word in (("--vit-max-pixels", "most"), ("--vit-min-pixels", "least")):
        p.add_argument(
            name,
            type=Whole(1, 10**9),
            metavar="N",
            help=f"{word} pixels to which pictures are scaled for the vision tower (default: the model's)",
        )
    p.add_argument(
        "--max-images",
        type=Whole(0),
        metavar="N",
        help="most images in an answer; 0: the model only writes text (default: no limit)",
    )
    latents = "; models that work on latents always use the vision tower"
    add_images(p, "images of requests that set no `via`", latents)
    p.add_argument(
        "--editing",
        action="store_true",
        help="accept `image_guidance` in requests; caches then take half as much memory again",
    )


def run(args: Namespace, _: list[str]) -> None:
    """Serve until a signal ends the server. Raises UserError. `args`: the command's options."""
    key = os.environ.get("STARFLOW2_API_KEY") if args.api_key is None else args.api_key
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError(
            "--api-key: a key has only visible ASCII characters and no spaces, because an HTTP header carries it"
        )
    try:
        from starflow2_jax.serving.server import Limits, Server, bind, end_quietly
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install 'starflow2_jax[serve]'") from None
    listeners = bind(args.host, args.port)  # a port that is taken is noticed before the model is loaded
    sampler = restore(args, data=1)
    limits = Limits(
        rows=args.rows,
        max_queue=args.max_queue,
        max_tokens=args.max_tokens,
        max_pixels=args.max_pixels,
        max_body=args.max_body,
        grace=args.grace,
        jacobi=args.jacobi,
        keep=args.keep,
        images=args.images,
        editing=args.editing,
        max_images=args.max_images,
        vit_min_pixels=args.vit_min_pixels,
        vit_max_pixels=args.vit_max_pixels,
        origins=tuple(args.allow_origin),
    )
    name = args.name or Path(args.checkpoint).resolve().name

    def ready(address: str) -> None:
        print(f"serving {name} on {address}", flush=True)

    server = Server(sampler, name, limits, args.host, listeners, key, ready)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("starflow2_jax").setLevel(logging.INFO)  # log what is compiled
    server.worker.warm()
    end_quietly()
    server.run()
    if server.worker.lost:
        raise SystemExit("the device failed and did not recover; the log says why; start the server again")
    print("the server has ended")
