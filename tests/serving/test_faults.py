"""Requests that fail, clients that leave, a server that is full or ends: what it means for the others."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
from live import ASK, LIMITS, ask, held, openai_client, served, wait_until


def test_full_queue(client, running):
    worker = running[0].worker
    leave = held(worker)
    with ThreadPoolExecutor(LIMITS.max_queue) as pool:
        asked = [pool.submit(ask, client, max_tokens=2, seed=i) for i in range(LIMITS.max_queue)]
        wait_until(lambda: len(worker.waiting) == LIMITS.max_queue)
        with pytest.raises(openai.RateLimitError, match="6 requests are already waiting"):
            ask(client)
        leave.set()
        assert all(a.result().choices for a in asked)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(address, running, client, stream, monkeypatch):
    """The batch stands still after the first chunk, until the server knows that the client is gone."""
    worker, go_on, begun = running[0].worker, threading.Event(), []
    report = worker._report

    def stand():
        begun.extend(w for w in worker.writing if w)
        report()
        assert go_on.wait(60)

    monkeypatch.setattr(worker, "_report", stand)
    body = {"model": "tiny", "messages": ASK, "max_tokens": 60, "seed": 1, "stream": stream, "image_first": True}
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as http:
        if stream:
            request = http.build_request("POST", "/v1/chat/completions", json=body)
            http.send(request, stream=True).close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=1)
        wait_until(lambda: begun and begun[0].job.cancelled)
    go_on.set()
    wait_until(lambda: not worker.running and not worker.waiting)
    [writing] = begun
    assert writing.answer.ended is None
    monkeypatch.undo()
    assert ask(client, max_tokens=2).choices


def test_a_fault_leaves_the_others_alone(client, running, monkeypatch):
    """A request that fails in reading, and one that fails in its answer, beside one that does not."""
    worker = running[0].worker
    want = ask(client, max_tokens=30, seed=1, image_first=True).choices[0].message.parts
    beginning, pictures = worker._beginning, worker.sampler.pictures

    def broken(job):
        if job.request.seeds == [666]:
            raise RuntimeError("broken")
        return beginning(job)

    def spoiled(*arguments):
        return [
            {
                at: pixels * (np.nan if worker.writing[i].job.request.seeds == [667] else 1)
                for at, pixels in some.items()
            }
            for i, some in enumerate(pictures(*arguments))
        ]

    monkeypatch.setattr(worker, "_beginning", broken)
    monkeypatch.setattr(worker.sampler, "pictures", spoiled)
    leave = held(worker)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, client, max_tokens=30, seed=s, image_first=True) for s in (666, 667, 1)]
        wait_until(lambda: len(worker.waiting) == 3)
        leave.set()
        for failed, message in zip(asked, ("inside the server", "not finite"), strict=False):
            with pytest.raises(openai.InternalServerError, match=message):
                failed.result()
        assert asked[2].result().choices[0].message.parts == want
    wait_until(lambda: not worker.running)


@pytest.mark.parametrize("grace, finished", [(60.0, True), (0.0, False)])
def test_shutdown(sampler, grace, finished):
    """On SIGTERM what runs is finished, or gets 503 when the time is up; what waits gets 503."""
    limits = replace(LIMITS, rows=1, grace=grace)
    with served(sampler, limits) as (server, address):
        client = openai_client(address)
        leave = held(server.worker)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, client, max_tokens=60, seed=1, max_images=0, stop="never")
            wait_until(lambda: len(server.worker.waiting) == 1)
            second = pool.submit(ask, client, max_tokens=60, seed=2)
            wait_until(lambda: len(server.worker.waiting) == 2)
            chunks = iter(range(2))
            turn = server.worker._report

            def report():
                turn()
                if next(chunks, 1) == 0:
                    server.handle_exit(signal.SIGTERM, None)

            server.worker._report = report
            leave.set()
            with pytest.raises(openai.InternalServerError, match="closing") as refused:
                second.result()
            assert refused.value.status_code == 503
            if finished:
                assert first.result().usage.completion_tokens > 4
            else:
                with pytest.raises(openai.InternalServerError, match="closing"):
                    first.result()
