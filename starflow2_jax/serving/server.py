"""The HTTP server: a sampler, its worker thread and uvicorn. After SIGTERM or SIGINT it finishes running requests."""

import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn

from starflow2_jax.errors import UserError, shown
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.serving.app import AHEAD, BODIES, Service, make_app
from starflow2_jax.serving.guards import Line, Room
from starflow2_jax.serving.request_limits import RequestLimits
from starflow2_jax.serving.worker import Worker

BACKLOG = 2048  # connections that the system holds until the server accepts them


@dataclass(frozen=True)
class Limits:
    """Options of a server."""

    rows: int = 8  # answers that are written at the same time
    max_queue: int = 512  # requests that may wait
    max_tokens: int = 512  # positions of an answer, image tokens included
    max_pixels: int = 40_000_000  # of an image as it is decoded, beside those before it as they are kept
    max_body: int = 32_000_000  # bytes of a request
    grace: float = 20.0  # seconds that running requests get when the server is stopped
    jacobi: int = 0  # image tokens to solve for at once; 0: as calibrated, or else 1
    keep: int = 4  # conversations whose caches are kept
    images: str = "flow"  # how the model sees images that set no `via`
    editing: bool = False  # whether requests may use `image_guidance`
    max_images: int | None = None  # most images of an answer; None: any number
    vit_min_pixels: int | None = None  # least and most pixels to which pictures are scaled for the vision tower;
    vit_max_pixels: int | None = None  # None: the model's
    origins: tuple[str, ...] = ()  # web sites whose pages may use the server; "*": all


def bind(host: str, port: int) -> tuple[socket.socket, ...]:
    """Sockets bound to all addresses of `host`, so that no other program takes them. They do not listen yet.

    `port`: 0 takes a free one. Raises UserError if an address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {shown(host)} is no address of this machine ({_reason(error)})") from None
    bound: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listener = socket.socket(family, kind, protocol)
        bound.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind((address[0], port or bound[0].getsockname()[1], *address[2:]))
        except OSError as error:
            for each in bound:
                each.close()
            raise _taken(host, port, error) from None
    return tuple(bound)


def _taken(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"cannot listen on {host} port {port} ({_reason(error)}); set another --port or --host")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


class Server(uvicorn.Server):
    """Serves a sampler until a signal ends it, or until the device fails and does not recover (`worker.lost`).

    After a signal, running requests may finish within `limits.grace` seconds; waiting ones get 503. `name`: the
    model's name in requests. `host`: the host name or address that the user gave. `listeners`: sockets from `bind`.
    `key`: the key that clients must send; None: they need none. `ready`: called with the server's URL once it accepts
    requests. Raises UserError for limits that do not fit the model.
    """

    def __init__(
        self,
        sampler: Sampler,
        name: str,
        limits: Limits,
        host: str,
        listeners: tuple[socket.socket, ...],
        key: str | None = None,
        ready: Callable[[str], None] = lambda address: None,
    ):
        self.limits, self.listeners, self.ready = limits, listeners, ready
        if limits.images == "vit" and sampler.model.cfg.vlm.vision is None:
            raise UserError("--images vit needs a vision tower, which this model does not have; use --images flow")
        _see(sampler, limits)
        request_limits = RequestLimits.of(
            sampler,
            max_pixels=limits.max_pixels,
            max_choices=limits.rows,
            images=limits.images,
            editing=limits.editing,
            max_images=limits.max_images,
        )
        if limits.editing and not request_limits.reads:
            raise UserError(
                "--editing needs a model that draws pixels and reads them, but this one reads latents; leave it out"
            )
        if limits.editing and not request_limits.drawing:
            raise UserError("--editing needs answers with images, but --max-images is 0; leave out one of the two")
        self.worker = Worker(
            sampler,
            limits.rows,
            limits.max_tokens,
            limits.max_queue,
            jacobi=limits.jacobi,
            keep=limits.keep,
            editing=limits.editing,
            draws=request_limits.drawing,
            images=request_limits.images,
        )
        line = Line(limits.rows + AHEAD)
        self.room = Room(
            BODIES * limits.max_body, lambda: self.worker.seconds_to_wait(len(self.worker.waiting) + line.waiting)
        )
        service = Service(
            self.worker, name, request_limits, key, limits.max_body, host, limits.origins, line, self.room
        )
        app = make_app(service)
        super().__init__(
            uvicorn.Config(
                app,
                host,
                log_level="warning",
                server_header=False,
                lifespan="off",
                ws="none",
                backlog=BACKLOG,
                timeout_graceful_shutdown=int(limits.grace) + 5,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End after a signal. uvicorn calls this."""
        self.worker.close(self.limits.grace)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests, and call `ready`. uvicorn calls this."""
        await super().startup(sockets)
        if self.started:
            host, port = self.config.host, self.listeners[0].getsockname()[1]
            self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Whether the server ends, which it also does if the worker has ended. uvicorn calls this ten times a
        second.
        """
        return await super().on_tick(counter) or not self.worker.is_alive()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end. Raises UserError if another server has begun to listen on the address since `bind`."""
        for listener in self.listeners:
            try:
                listener.listen(BACKLOG)
            except OSError as error:
                raise _taken(self.config.host, listener.getsockname()[1], error) from None
        self.worker.start()
        try:
            super().run(list(self.listeners))
        finally:
            self.worker.close(0)
            self.worker.join()


def _see(sampler: Sampler, limits: Limits) -> None:
    """Let the sampler scale pictures for its vision tower to the server's bounds. Raises UserError."""
    given = {"min_pixels": limits.vit_min_pixels, "max_pixels": limits.vit_max_pixels}
    bounds = {name: value for name, value in given.items() if value is not None}
    if not bounds:
        return
    if sampler.encoder.vision is None:
        raise UserError(
            "--vit-min-pixels and --vit-max-pixels need a vision tower, which this model does not have; leave them out"
        )
    sampler.encoder.vision = replace(sampler.encoder.vision, **bounds)


def end_quietly() -> None:
    """Ignore the signal that uvicorn raises again after it has ended. Call this in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
