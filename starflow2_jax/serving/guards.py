"""Middleware in front of the endpoints. It refuses unknown host names, and too many requests at the same time."""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from starflow2_jax.serving.errors import ApiError, bad


class KnownHosts:
    """Refuses requests unless their Host header is one of `names`, localhost or an IP address.

    So a web page of another site cannot reach this server by letting the site's name resolve to it (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...]):
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request: refuse it, or pass it on."""
        if scope["type"] == "http" and not self._known(Request(scope).headers.get("host", "")):
            error = bad(
                "this server does not accept the host name of this request; use localhost, an IP address or the name "
                "given as --host, or start the server with an API key"
            )
            await refusal(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _known(self, host: str) -> bool:
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        try:
            return name.lower() in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


class AtMost:
    """Allows `count` POST requests at the same time, and refuses more before it reads their bodies.

    `retry`: the seconds after which a refused client may try again, given the number of requests ahead of it.
    """

    def __init__(self, app: ASGIApp, count: int, retry: Callable[[int], int]):
        self.app, self.count, self.retry, self.inside = app, count, retry, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an ASGI request: refuse it, or pass it on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self.inside >= self.count:
            error = ApiError(
                429,
                f"the server is already handling {self.count} requests; try again later",
                "queue_full",
                retry=self.retry(self.count),
            )
            await refusal(error)(scope, receive, send)
        else:
            self.inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.inside -= 1


def refusal(error: ApiError) -> JSONResponse:
    """The response for an error, with the headers that belong to its status."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
    mine = {"Retry-After": str(error.retry)} if error.retry else headers.get(error.status)
    return JSONResponse(error.body(), error.status, mine)


class Line:
    """Lets `count` requests at a time decode their pictures and wait for the device. The others wait as their bodies
    came.
    """

    def __init__(self, count: int):
        self.places, self.waiting = asyncio.Semaphore(count), 0

    @contextlib.asynccontextmanager
    async def turn(self, gone: asyncio.Future) -> AsyncIterator[None]:
        """A place, first come, first served. Raises ClientDisconnect if `gone` is done first."""
        mine = asyncio.ensure_future(self.places.acquire())
        self.waiting += 1
        try:
            try:
                await asyncio.wait((mine, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.waiting -= 1
            if not mine.done():
                raise ClientDisconnect
            yield
        finally:
            if mine.done():
                self.places.release()
            else:
                mine.cancel()


class Room:
    """The bytes of requests that are held together, `most` at a time.

    `retry`: the seconds after which a refused client may try again.
    """

    def __init__(self, most: int, retry: Callable[[], int]):
        self.most, self.retry, self.used = most, retry, 0

    def take(self, count: int) -> None:
        """Count more bytes. Raises ApiError if there are too many."""
        self.used += count
        if self.used > self.most:
            message = f"the requests that wait have {self.most} bytes together; try again later"
            raise ApiError(429, message, "queue_full", retry=self.retry())
