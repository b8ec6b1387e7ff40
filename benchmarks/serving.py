"""Puts a running server under load: measures answers per second, latency and failures, or soaks it in mixed requests.

    starflow2 serve --checkpoint quickstart/checkpoint --port 8000 --rows 8 &
    python benchmarks/serving.py --url http://127.0.0.1:8000 --clients 1 8 32        # images of digits
    python benchmarks/serving.py --url http://127.0.0.1:8000 --soak 600              # seconds of mixed requests

A client sends its next request when the last one is answered. If the server's queue is full (status 429), the client
counts that and sends the request again; any other error is a failure. The soak draws, reads, streams, asks for several
choices, ranks, hangs up in the middle of an answer, and sends wrong requests that the server must refuse. The client
checks every answer.
"""

import argparse
import base64
import io
import json
import random
import statistics
import threading
import time
from collections import Counter

import httpx
import openai
from PIL import Image as Pillow

from starflow2_jax.data import digits
from starflow2_jax.data.images import as_pillow

WORDS = digits.WORDS[:10]


class Load:
    """The server's address, shared by all clients, and the results of their requests."""

    def __init__(self, url: str):
        http = httpx.Client(trust_env=False, timeout=300, limits=httpx.Limits(max_connections=100))
        self.url, self.http = url, http
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)
        self.model = self.client.models.list().data[0].id
        self.seconds: list[float] = []
        self.counts: Counter = Counter()
        self.lock = threading.Lock()

    def ask(self, content, stream: bool = False, n: int = 1, **extra):
        body = {"temperature": 0, "n": n, "max_tokens": 48, "stream": stream, "extra_body": extra}
        return self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": content}], **body
        )

    def draw(self, rng: random.Random) -> None:
        answer = self.ask(f"draw the digit {rng.choice(WORDS)}", image_first=True, max_images=1, guidance=1.0)
        decode(answer.choices[0].message.images[0])

    def choices(self, rng: random.Random) -> None:
        answer = self.ask(f"write {rng.choice(WORDS)}", n=3, image_first=True, max_images=1)
        assert len(answer.choices) == 3
        for choice in answer.choices:
            decode(choice.message.images[0])

    def read(self, rng: random.Random) -> None:
        pixels, labels = digits.split("held_out")
        i = rng.randrange(len(labels))
        content = [scan(pixels[i]), {"type": "text", "text": "which digit is this?"}]
        assert self.ask(content, max_images=0).choices[0].message.content

    def streamed(self, rng: random.Random) -> None:
        first = rng.randrange(5)
        parts = [c.choices[0] for c in self.ask(f"count from {WORDS[first]} to {WORDS[first + 2]}", True) if c.choices]
        assert parts[-1].finish_reason in ("stop", "length")

    def hang_up(self, rng: random.Random) -> None:
        stream = self.ask(f"draw {rng.choice(WORDS)}", True, image_first=True)
        next(iter(stream))
        stream.close()

    def rank(self, rng: random.Random) -> None:
        pixels, _ = digits.split("held_out")
        body = {"image": scan(pixels[rng.randrange(len(pixels))])["image_url"]["url"], "captions": [*WORDS]}
        answer = self.http.post(f"{self.url}/v1/rank", json=body)
        if answer.status_code == 429:
            raise openai.RateLimitError("full", response=answer, body=None)
        assert answer.status_code == 200 and len(answer.json()["data"]) == 10

    def nonsense(self, rng: random.Random) -> None:
        try:
            self.ask("x", temprature=1)
        except openai.BadRequestError:
            return
        raise AssertionError("the server accepted a request with an unknown option")

    def work(self, kinds: list[str], until, seed: int) -> None:
        """Send requests one after another while until() is true."""
        rng = random.Random(seed)
        while until():
            kind = rng.choice(kinds)
            begin = time.perf_counter()
            while True:
                try:
                    getattr(self, kind)(rng)
                    result = kind
                except openai.RateLimitError:
                    with self.lock:
                        self.counts["turned away, sent again"] += 1
                    time.sleep(1)
                    continue
                except Exception as error:
                    result = f"FAILED {kind}: {type(error).__name__} {error}"[:200]
                break
            with self.lock:
                self.counts[result] += 1
                self.seconds.append(time.perf_counter() - begin)

    def run(self, clients: int, kinds: list[str], until) -> float:
        """Run `clients` clients at once; returns the seconds that they took together."""
        self.seconds, self.counts = [], Counter()
        threads = [threading.Thread(target=self.work, args=(kinds, until, i)) for i in range(clients)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begin

    def report(self, clients: int, took: float) -> None:
        ordered = sorted(self.seconds)
        found = {"clients": clients, "seconds": round(took, 1), "per_second": round(len(ordered) / took, 2)}
        found |= {
            "median_latency": round(statistics.median(ordered), 3),
            "p95": round(ordered[int(0.95 * len(ordered))], 3),
        }
        print(json.dumps(found | {"counts": dict(self.counts)}), flush=True)


def decode(part) -> None:
    """Check that a part of an answer is a picture of a digit's size."""
    url = (part if isinstance(part, dict) else part.model_dump())["image_url"]["url"]
    with Pillow.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        assert image.size == (8, 8)


def scan(pixels) -> dict:
    """Pixels as a part of a request."""
    file = io.BytesIO()
    as_pillow(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", required=True, help="address of the server")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients at once")
    p.add_argument("--seconds", type=float, default=30, help="seconds of load for each number of clients")
    p.add_argument("--soak", type=float, default=0, help="seconds of mixed requests by 8 clients instead")
    a = p.parse_args()
    load = Load(a.url)
    load.draw(random.Random(0))
    kinds = ["draw", "choices", "read", "streamed", "hang_up", "rank", "nonsense"] if a.soak else ["draw"]
    for clients in [8] if a.soak else a.clients:
        end = time.monotonic() + (a.soak or a.seconds)
        load.report(clients, load.run(clients, kinds, lambda end=end: time.monotonic() < end))
    state = load.http.get(f"{a.url}/health").json()
    print(json.dumps({"health": state}))
    if any(name.startswith("FAILED") for name in load.counts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
