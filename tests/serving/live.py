"""A server with the tiny random model, on a free port of this machine."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import tiny
from openai import OpenAI
from PIL import Image as Pillow

from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.data.documents import Text
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.serving.jobs import Task
from starflow2_jax.serving.server import Limits, Server, bind

LIMITS = Limits(rows=3, max_queue=6, max_tokens=200, max_pixels=10_000, max_body=200_000, grace=30.0)
KEY = "open-sesame"
ASK = [{"role": "user", "content": "draw an eight"}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def served(
    sampler: Sampler, limits: Limits = LIMITS, key: str | None = None, warm: bool = False
) -> Iterator[tuple[Server, str]]:
    """The server and its address."""
    server = Server(sampler, "tiny", limits, "127.0.0.1", bind("127.0.0.1", 0), key)
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


def of_latents(config: PretzelConfig = tiny.CONFIG) -> Sampler:
    """The same model, its images being latents: it sees and writes no pictures but through the vision tower."""
    codec = LatentCodec(tiny.GRID, tiny.CHANNELS)
    return Sampler(Pretzel(config), tiny.params(), tiny.tokenizer(), codec, max_positions=256)


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


def data_url(image: Pillow.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def pixels_of(url: str) -> np.ndarray:
    with Pillow.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image, np.float32)[..., None] / 127.5 - 1


def image_part(url: str, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def ask(client, messages=ASK, **options):
    known = {
        k: options.pop(k)
        for k in ("max_tokens", "seed", "temperature", "top_p", "stop", "n", "stream", "stream_options")
        if k in options
    }
    return client.chat.completions.create(model="tiny", messages=messages, extra_body=options, **known)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def the_same(parts: list[dict], document) -> None:
    """An answer of the server and one of the sampler."""
    assert [p["type"] for p in parts] == ["text" if isinstance(p, Text) else "image_url" for p in document]
    for part, want in zip(parts, document, strict=True):
        if isinstance(want, Text):
            assert part["text"] == want.text
        else:
            np.testing.assert_allclose(pixels_of(part["image_url"]["url"]), np.clip(want.pixels, -1, 1), atol=0.01)


def held(worker):
    """The device's thread stands still in a task until the event is set."""
    entered, leave = threading.Event(), threading.Event()

    def stand():
        entered.set()
        assert leave.wait(60)
        yield

    worker.submit(Task(stand()))
    assert entered.wait(60)
    return leave
