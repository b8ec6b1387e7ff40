"""A sampler, its worker and uvicorn together; SIGTERM and SIGINT end them in order."""

import signal
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.serving.app import Service, make_app
from starflow2_jax.serving.request_limits import Intake
from starflow2_jax.serving.worker import Worker


@dataclass(frozen=True)
class Limits:
    rows: int = 8  # answers that are written at once
    max_queue: int = 32  # requests that may wait
    max_tokens: int = 512  # positions of an answer, image tokens included
    max_pixels: int = 16_000_000  # of the images of a request together
    max_body: int = 32_000_000  # bytes of a request
    grace: float = 20.0  # seconds that running requests have when the server is told to end
    jacobi: int = 0  # image tokens solved for at once; 0: as calibrated, else 1
    keep: int = 4  # conversations whose caches are kept
    images: str = "flow"  # how images are seen whose `via` is not given
    editing: bool = False  # rows have the lane for `image_guidance`


class Server(uvicorn.Server):
    """`run()` serves until it is told to end: running requests finish within the grace time, the others get 503. It ends
    itself where the device has failed for good, `worker.lost`. `ready` is called with the address once it listens."""

    def __init__(
        self, sampler: Sampler, name: str, limits: Limits, host: str, port: int, key: str | None = None,
        ready: Callable[[str], None] = lambda address: None,
    ):  # fmt: skip
        self.limits, self.ready = limits, ready
        if limits.images == "vit" and sampler.model.cfg.vlm.vision is None:
            raise UserError("--images vit needs a vision tower, which this model does not have")
        intake = Intake.of(
            sampler, max_pixels=limits.max_pixels, max_choices=limits.rows, images=limits.images, editing=limits.editing
        )
        if limits.editing and not intake.draws:
            raise UserError("--editing needs a model that draws pixels; the images of this one are latents")
        self.worker = Worker(
            sampler, limits.rows, limits.max_tokens, limits.max_queue, jacobi=limits.jacobi, keep=limits.keep,
            editing=limits.editing, draws=intake.draws,
        )  # fmt: skip
        app = make_app(Service(self.worker, name, intake, key, limits.max_body, host))
        config = uvicorn.Config(
            app, host, port, log_level="warning", server_header=False, lifespan="off", ws="none",
            timeout_graceful_shutdown=int(limits.grace) + 5,
        )  # fmt: skip
        super().__init__(config)

    def handle_exit(self, sig, frame) -> None:
        self.worker.close(self.limits.grace)
        super().handle_exit(sig, frame)

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.config.host, self.servers[0].sockets[0].getsockname()[1]
            self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Ends the server when the worker has ended, too."""
        return await super().on_tick(counter) or not self.worker.is_alive()

    def run(self, sockets=None) -> None:
        self.worker.start()
        try:
            super().run(sockets)
        finally:
            self.worker.close(0)
            self.worker.join()


def end_quietly() -> None:
    """uvicorn raises the signal that ended it once more; here that is the end of a normal run. Main thread only."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
