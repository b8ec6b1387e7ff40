"""A server with the tiny random model, on a free port of this machine."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import tiny
from openai import OpenAI

from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.serving.server import Limits, Server

LIMITS = Limits(rows=3, max_queue=6, max_tokens=200, max_pixels=10_000, max_body=200_000, grace=30.0)
KEY = "sésame"


@contextmanager
def served(
    sampler: Sampler, limits: Limits = LIMITS, key: str | None = None, warm: bool = False
) -> Iterator[tuple[Server, str]]:
    """The server and its address."""
    server = Server(sampler, "tiny", limits, "127.0.0.1", 0, key)
    if warm:
        server.worker.warm()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not server.worker.is_alive()


@pytest.fixture(scope="session")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)


@pytest.fixture(scope="module")
def running(sampler) -> Iterator[tuple[Server, str]]:
    with served(sampler) as found:
        yield found


@pytest.fixture
def address(running) -> str:
    return running[1]


@pytest.fixture
def client(address) -> OpenAI:
    return openai_client(address)


def openai_client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False))
