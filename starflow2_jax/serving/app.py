"""The HTTP endpoints: OpenAI's chat completions with images in prompts and answers, ranking of captions, the web
page.
"""

import asyncio
import functools
import hmac
import json
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from starflow2_jax.data.documents import DocumentError
from starflow2_jax.sampling.events import End, Event
from starflow2_jax.serving import completions
from starflow2_jax.serving.errors import ApiError, bad, told
from starflow2_jax.serving.guards import AtMost, KnownHosts, Line, Room, refusal
from starflow2_jax.serving.jobs import Fault, Job, Started, Task
from starflow2_jax.serving.ranking import ranking
from starflow2_jax.serving.request_limits import RequestLimits
from starflow2_jax.serving.requests import chat_request, check_model, rank_request
from starflow2_jax.serving.worker import Worker

PAGE, SCRIPT = (Path(__file__).with_name(f"page.{suffix}") for suffix in ("html", "js"))
BODY_SECONDS = 60  # limit for receiving a whole request
BODIES = 64  # requests of the largest size that may wait together; of smaller ones, more
AHEAD = 8  # prompts that are decoded while no row is free for them
GZIP = 16 + zlib.MAX_WBITS  # zlib's number for the gzip format
SAFETY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Service:
    """What all endpoints share."""

    worker: Worker
    name: str  # of the model
    limits: RequestLimits
    key: str | None  # that clients must send
    max_body: int  # bytes of a request
    host: str  # the name of the address that the server listens on
    origins: tuple[str, ...]  # web sites whose pages may use the server; "*": all
    line: Line
    room: Room

    @property
    def model(self) -> dict[str, Any]:
        """The model as /v1/models describes it."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "starflow2",
            "drawing": self.limits.drawing,
            "editing": self.limits.editing,
            "most_choices": self.limits.max_choices,
        }

    async def body(self, request: Request) -> object:
        """The JSON value in the body of a request for this model. Raises ApiError."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise bad("the body must be JSON; send it with Content-Type: application/json")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip"):
            raise ApiError(
                415, f"the body has the encoding {encoding!r}; send it as it is, or with gzip", "unsupported"
            )
        data, packed = bytearray(), zlib.decompressobj(GZIP) if encoding == "gzip" else None
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    piece = packed.decompress(piece, self.max_body + 1 - len(data)) if packed else piece
                    data += piece
                    request.state.held += len(piece)
                    self.room.take(len(piece))
                    if len(data) > self.max_body:
                        raise ApiError(
                            413,
                            f"a request may have at most {self.max_body} bytes; send smaller or fewer images",
                            "too_large",
                        )
        except TimeoutError:
            raise ApiError(
                408, f"the request did not arrive within {BODY_SECONDS} seconds; send it again", "timeout"
            ) from None
        except zlib.error:
            raise bad("the body is not valid gzip") from None
        if packed and not packed.eof:
            raise bad("the body is not whole gzip data")
        body = await run_in_threadpool(_parsed, data)
        check_model(body, self.name)
        return body

    def check_key(self, request: Request) -> None:
        """Raises ApiError if the server has a key and the request does not bring it."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode("latin-1"), self.key.encode()):
            raise ApiError(
                401, "this server needs its API key; send the header Authorization: Bearer KEY", "invalid_api_key"
            )


def _parsed(data: bytearray) -> object:
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise bad("the body is not valid Unicode text") from None
    except (ValueError, RecursionError):
        raise bad("the body is not valid JSON") from None
    return body


def make_app(service: Service) -> Starlette:
    """The ASGI application that answers requests to `service`."""
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        ApiError: _api_error,
        DocumentError: _api_error,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _fault,
    }
    return Starlette(
        routes=[
            Route("/", _index),
            Route("/health", functools.partial(_health, service)),
            Route("/v1/models", _guarded(service, _models)),
            Route("/v1/models/{name:path}", _guarded(service, _model)),
            Route("/v1/chat/completions", _guarded(service, _chat), methods=["POST"]),
            Route("/v1/rank", _guarded(service, _rank), methods=["POST"]),
        ],
        exception_handlers=handlers,
        middleware=_guards(service),
    )


def _guards(service: Service) -> list[Middleware]:
    """What a request passes before its endpoint."""
    places = service.worker.size + service.worker.max_queue  # for requests that are answered, and that wait
    guards = [Middleware(AtMost, places, service.worker.seconds_to_wait)]
    if service.key is None:
        guards.insert(0, Middleware(KnownHosts, (service.host,)))
    if service.origins:
        headers = ["Authorization", "Content-Type", "Content-Encoding"]
        cors = Middleware(CORSMiddleware, service.origins, ("GET", "POST"), headers, expose_headers=["Retry-After"])
        guards.insert(0, cors)
    return guards


def _guarded(service: Service, endpoint: Callable[[Service, Request], Awaitable[Response]]):
    """The endpoint, restricted to clients with the server's key. Once a request is answered, its bytes no
    longer count against the server's limit.
    """

    async def checked(request: Request) -> Response:
        service.check_key(request)
        request.state.held = 0
        try:
            return await endpoint(service, request)
        finally:
            service.room.used -= request.state.held

    return checked


async def _index(request: Request) -> Response:
    return HTMLResponse(_page(), headers=SAFETY)


@functools.cache
def _page() -> str:
    return PAGE.read_text(encoding="utf-8").replace("{{ page.js }}", SCRIPT.read_text(encoding="utf-8"))


async def _health(service: Service, request: Request) -> Response:
    worker = service.worker
    well = worker.is_alive() and worker.closing is None
    state = {
        "status": "ok" if well else "closing",
        "running": worker.running,
        "waiting": len(worker.waiting) + service.line.waiting,
        "programs": len(worker.sampler.programs),  # compiled so far
    }
    return JSONResponse(state, 200 if well else 503)


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [service.model]})


async def _model(service: Service, request: Request) -> Response:
    check_model({"model": request.path_params["name"]}, service.name)
    return JSONResponse(service.model)


async def _chat(service: Service, request: Request) -> Response:
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    body = await service.body(request)

    def tell(event: Started | Event | Fault) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        async with service.line.turn(gone):
            job = await run_in_threadpool(_job, service, body, tell)
            wanted = job.request
            service.worker.submit(job)
            story = _events(service.worker, job, events, gone)
            first = await anext(story)  # an error in the prompt sets the status of the response, streamed or not
    except BaseException:
        gone.cancel()
        raise
    if wanted.stream:
        lines = completions.stream(story, first, frame, wanted.include_usage)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    scored = wanted.options.logprobs is not None
    return JSONResponse(await completions.whole(story, first, frame, len(wanted.seeds), scored))


def _job(service: Service, body: object, tell: Callable[[Started | Event | Fault], None]) -> Job:
    return service.worker.job(chat_request(body, service.limits), tell)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(worker: Worker, job: Job, events: asyncio.Queue, gone: asyncio.Future) -> AsyncGenerator[Any, None]:
    """Yields Started and then the Events of a job, until all its choices have ended.

    Raises the ApiError of a Fault. If the client disconnects, or nobody reads on, the job is cancelled, which frees its
    rows.
    """
    open_choices, coming = len(job.request.seeds), gone
    try:
        while open_choices:
            coming = asyncio.ensure_future(events.get())
            await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ClientDisconnect
            event = coming.result()
            if isinstance(event, Fault):
                raise event.error
            open_choices -= isinstance(event, End)
            yield event
    finally:
        gone.cancel()
        coming.cancel()
        if open_choices:
            worker.cancel(job)


async def _rank(service: Service, request: Request) -> Response:
    body = await service.body(request)
    task, by = await run_in_threadpool(_task, service, body)
    service.worker.submit(task)
    result, gone = asyncio.wrap_future(task.result), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        pairs = result.result()
    finally:
        gone.cancel()
        service.worker.cancel(task)
    data = [{"caption": caption, "nats": nats} for caption, nats in pairs]
    return JSONResponse({"object": "list", "model": service.name, "by": by, "data": data})


def _task(service: Service, body: object) -> tuple[Task, str]:
    image, captions, by_image = rank_request(body, service.limits)
    try:
        pieces = ranking(service.worker.sampler, image, captions, by_image)
    except DocumentError as error:
        raise bad(str(error), "captions", "invalid_prompt") from None
    return Task(pieces), "image" if by_image else "text"


async def _api_error(request: Request, error: ApiError | DocumentError) -> Response:
    return refusal(told(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # the client has gone


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why").body(), 500)
