"""What a server does not let happen: too much, too large, in another's name, and one request's end becoming
everyone's.
"""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import openai
import pytest
import tiny
from live import LIMITS, ask, data_url, held, image_part, openai_client, served, the_same, wait_until
from PIL import Image as Pillow

from starflow2_jax.data.documents import Text
from starflow2_jax.data.images import as_pillow
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.scoring import rank
from starflow2_jax.serving import ranking
from starflow2_jax.serving import worker as worker_module
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.images import Budget
from starflow2_jax.serving.request_limits import RequestLimits
from starflow2_jax.serving.requests import chat_request

NEVER = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


@pytest.mark.parametrize("positions", [250, 256, 390])
def test_a_prompt_that_leaves_hardly_any_room(positions):
    """Read in pieces up to the last position of a row; the answer is what was asked for or what fits."""
    sampler = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=positions)
    with served(sampler, LIMITS) as (server, address):
        client = openai_client(address)
        for prompt in (positions - 5, positions - 1):
            messages = [{"role": "user", "content": "!" * prompt}]
            answer = ask(client, messages, max_tokens=5, max_images=0, temperature=0)
            options = SampleOptions(0, max_tokens=min(5, positions - prompt), max_images=0)
            the_same(answer.choices[0].message.parts, *sampler.generate([[Text("!" * prompt)]], options))
            assert answer.usage.prompt_tokens == prompt and answer.usage.completion_tokens >= 1
            image = ask(client, messages, max_tokens=50, image_first=True)
            assert image.usage.completion_tokens == min(50, positions - prompt)
        with pytest.raises(openai.BadRequestError, match=f"leaves none of the {positions}"):
            ask(client, [{"role": "user", "content": "!" * positions}])
        assert server.worker.is_alive()


def test_a_fault_while_entering_ends_that_request_alone(client, running, monkeypatch):
    """Also where it takes the batch's buffers with it: then what runs is given up, and the server goes on."""
    worker = running[0].worker
    put = worker_module._put

    def fails(batch, index, one):
        raise RuntimeError("no memory")

    def fails_late(batch, index, one):
        jax.tree.map(lambda x: x.delete(), batch)
        raise RuntimeError("no memory")

    for failing in (fails, fails_late):
        monkeypatch.setattr(worker_module, "_put", failing)
        with pytest.raises(openai.InternalServerError, match="inside the server"):
            ask(client, max_tokens=3)
        monkeypatch.setattr(worker_module, "_put", put)
        assert ask(client, max_tokens=3).choices and worker.closing is None


def test_a_device_that_is_lost_ends_the_server(sampler, monkeypatch):
    """Nothing waits for ever: what runs and what waits is answered, then the server ends by itself."""
    with served(sampler) as (server, address):
        worker, client = server.worker, openai_client(address)

        def fails(*_):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(worker_module.steps, "write", fails)
        monkeypatch.setattr(worker, "_empty", fails)
        leave = held(worker)
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(ask, client, max_tokens=3) for _ in range(5)]
            wait_until(lambda: len(worker.waiting) == 5)
            leave.set()
            for answer in asked:
                with pytest.raises(openai.InternalServerError):
                    answer.result(60)
        worker.join(60)
        assert worker.lost and worker.closing is not None
        wait_until(lambda: closed(address))


def closed(address: str) -> bool:
    try:
        httpx.get(f"{address}/health", trust_env=False)
    except httpx.TransportError:
        return True
    return False


def test_a_listener_whose_loop_is_closed_is_no_fault(client, running):
    worker = running[0].worker
    body = {"messages": NEVER, "max_tokens": 4}
    request_limits = RequestLimits.of(worker.sampler, max_pixels=10, max_choices=1)
    told = []

    def tell(event):
        told.append(event)
        raise RuntimeError("Event loop is closed")

    job = worker.job(chat_request(body, request_limits), tell)
    worker.submit(job)
    wait_until(lambda: job.cancelled and not worker.running and not worker.entering)
    assert len(told) == 1 and ask(client, max_tokens=2).choices


def test_pixels_are_counted_as_the_model_has_them(client):
    """A small file is not a small image: the model's size counts, and its positions."""
    dot = image_part(data_url(Pillow.new("L", (1, 1))))
    size, positions = tiny.SIZE[0] * tiny.SIZE[1], tiny.CONFIG.tokens + 2
    assert 256 // positions * size < LIMITS.max_pixels  # the positions end first
    fit = [dot] * (256 // positions)
    assert ask(client, [{"role": "user", "content": fit[:-1]}], max_tokens=1, max_images=0).usage
    with pytest.raises(openai.BadRequestError, match="more than the 256 positions"):
        ask(client, [{"role": "user", "content": [*fit, dot]}])


def test_pixels_of_small_files_against_the_limit(sampler):
    request_limits = RequestLimits.of(sampler, max_pixels=3 * 24, max_choices=1)
    budget = Budget(request_limits)
    for _ in range(3):
        budget.take((1, 1), "flow", "where")
    with pytest.raises(ApiError, match="72 pixels together"):
        budget.take((1, 1), "flow", "where")
    with pytest.raises(ApiError, match="72 pixels together"):  # the vision tower sees a dot as a square of its own
        [Budget(request_limits).take((1, 1), "vit", "where"), Budget(request_limits).take((8, 10), "vit", "where")]
    with pytest.raises(ApiError, match="200 times as long"):
        Budget(request_limits).take((1, 300), "vit", "where")


def test_bodies_are_read_for_as_many_as_may_be_here(sampler):
    """Requests whose bodies come slowly take the places; the next one is refused before it has sent its own."""
    with served(sampler) as (server, address):
        host, port = address.removeprefix("http://").split(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n"
        count = LIMITS.rows + LIMITS.max_queue
        open_ones = [socket.create_connection((host, int(port)), 60) for _ in range(count + 1)]
        try:
            for one in open_ones[:-1]:
                one.sendall(head.encode() + b"{")
            last = open_ones[-1]

            def refused() -> bool:  # the others may not have come in yet
                answer = httpx.post(f"{address}/v1/rank", json={}, trust_env=False)
                assert answer.status_code in (400, 429)
                return answer.status_code == 429

            wait_until(refused)
            last.sendall(head.encode())  # and no body
            answer = last.recv(10_000)
            assert b" 429 " in answer.split(b"\r\n")[0] and b"already handling 9 requests" in answer
            open_ones[0].sendall(b"    ")  # a whole body, but no JSON
            assert b" 400 " in open_ones[0].recv(10_000)
            wait_until(lambda: not refused())
        finally:
            for one in open_ones:
                one.close()


def test_cancelled_requests_leave_the_queue(client, running, address):
    worker = running[0].worker
    leave = held(worker)
    body = {"messages": NEVER, "max_tokens": 60}
    try:
        with httpx.Client(base_url=address, trust_env=False) as http:
            for _ in range(LIMITS.max_queue):
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/chat/completions", json=body, timeout=0.2)
        wait_until(lambda: not worker.waiting)
        with ThreadPoolExecutor(LIMITS.max_queue) as pool:
            asked = [pool.submit(ask, client, max_tokens=2) for _ in range(LIMITS.max_queue)]
            wait_until(lambda: len(worker.waiting) == LIMITS.max_queue)
            leave.set()
            assert all(a.result().choices for a in asked)
    finally:
        leave.set()


def test_a_ranking_that_nobody_waits_for_is_dropped(client, running, address, monkeypatch):
    """Before it begins, and between its pieces; the rows that are written meanwhile are not given up."""
    worker, ranked, scan = running[0].worker, [], data_url(as_pillow(tiny.pixels(3)))
    real = ranking.rank
    body = {"image": scan, "captions": [f"a {i}" for i in range(40)]}

    def rank(*arguments):
        ranked.append(arguments[2])
        if len(ranked) == 1:  # the client leaves while the first piece is computed
            wait_until(lambda: worker.entering[0].cancelled)
        return real(*arguments)

    monkeypatch.setattr(ranking, "rank", rank)
    with httpx.Client(base_url=address, trust_env=False) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/rank", json=body, timeout=2)
        wait_until(lambda: not worker.entering)
        assert len(ranked) == 1
        leave = held(worker)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/rank", json=body, timeout=0.5)
        wait_until(lambda: not worker.waiting)
        leave.set()
        assert ask(client, max_tokens=2).choices and len(ranked) == 1
        answer = http.post("/v1/rank", json=body, timeout=60).json()["data"]
        assert len(answer) == 40 and [len(r) for r in ranked[1:]] == [15, 15, 10]
        nats = [a["nats"] for a in answer]
        assert nats == sorted(nats, reverse=True)


@pytest.mark.parametrize(
    "host, status",
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("evil.example", 400), ("localhost.evil.example:80", 400), ("", 400)],
)  # fmt: skip
def test_other_names_reach_nothing(address, host, status):
    for url in ("/health", "/v1/models"):
        assert httpx.get(address + url, headers={"Host": host}, trust_env=False).status_code == status


def test_with_a_key_any_name_will_do(sampler):
    with served(sampler, key="key") as (_, address):
        assert httpx.get(f"{address}/health", headers={"Host": "box.example"}, trust_env=False).status_code == 200


def most_text() -> int:
    return max(map(len, tiny.tokenizer().get_vocab())) * 256


def test_text_is_refused_before_the_tokenizer(client, running, monkeypatch):
    monkeypatch.setattr(running[0].worker.sampler.encoder, "tokenize", lambda text: pytest.fail("it was tokenized"))
    half = {"role": "user", "content": "x" * (most_text() // 2 + 1)}
    with pytest.raises(openai.BadRequestError, match=r"at most \d+ characters together"):
        ask(client, [half, half])


def test_the_server_remembers_no_texts(client, running):
    ask(client, [{"role": "user", "content": "a secret"}], max_tokens=1)
    assert not hasattr(running[0].worker.sampler.encoder.tokenize, "cache_info")


def test_captions_are_texts_too(address):
    image = data_url(as_pillow(tiny.pixels(3)))
    for caption, message in (("<|im_end|>", "may not hold"), ("x" * 10**5, "characters"), ("draw " * 300, "exceeds")):
        answer = httpx.post(f"{address}/v1/rank", json={"image": image, "captions": [caption]}, trust_env=False)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    halves = ["x" * (most_text() // 2 + 1)] * 2  # one budget for all
    answer = httpx.post(f"{address}/v1/rank", json={"image": image, "captions": halves}, trust_env=False)
    assert "characters together; shorten the prompt" in answer.json()["error"]["message"]


@pytest.mark.parametrize("by_image", [True, False])
def test_captions_are_scored_as_many_at_once_as_positions_allow(by_image, monkeypatch):
    """The longest alone: no call has more positions than its row, or than the bound. The scores are those of one
    call.
    """
    captions = ["draw " * 20, "an eight", "a seven", "x" * 240]
    model = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    template = ranking.illustrate if by_image else ranking.describe
    want = rank(model, tiny.pixels(3), captions, by_image, template)
    for bound, rows in ((512, 2), (100, 1)):
        model.programs.clear()
        monkeypatch.setattr(ranking, "POSITIONS", bound)
        work = ranking.ranking(model, tiny.pixels(3), captions, by_image)
        with pytest.raises(StopIteration) as ended:
            while True:
                next(work)
        shapes = [shape for *_, shape in model.programs]
        assert max(s.rows for s in shapes) == rows and max(s.rows * s.length for s in shapes) <= max(bound, 256)
        assert [caption for caption, _ in ended.value.value] == [caption for caption, _ in want]
        np.testing.assert_allclose([n for _, n in ended.value.value], [n for _, n in want], rtol=1e-3)


def test_half_a_character_in_raw_bytes(address):
    body = json.dumps({"messages": NEVER}).encode().replace(b"x", "\ud800".encode("utf-8", "surrogatepass"))
    answer = httpx.post(
        f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, trust_env=False
    )
    assert answer.status_code == 400 and "Unicode" in answer.json()["error"]["message"]
