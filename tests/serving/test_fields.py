"""Fields and headers that other programs send: what is honoured, what is harmless, and what is refused by name."""

import asyncio
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import tiny
from live import ASK, LIMITS, TEMPLATE, ask, data_url, held, image_part, openai_client, served, the_same, wait_until
from PIL import Image as Pillow
from starlette.requests import ClientDisconnect

from starflow2_jax.data.documents import Text
from starflow2_jax.data.tokenizer import chat
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.guards import Line
from starflow2_jax.serving.request_limits import RequestLimits
from starflow2_jax.serving.requests import chat_request
from starflow2_jax.serving.server import Server

URL = "/v1/chat/completions"
TEXT = dict(max_tokens=12, max_images=0, temperature=0)


def options_of(sampler, **fields) -> SampleOptions:
    limits = RequestLimits.of(sampler, max_pixels=10_000, max_choices=1)
    return chat_request({"messages": ASK, **fields}, limits).options


def test_an_answer_without_text_is_an_empty_text(client):
    """Harnesses join and store it; null stands for calls of tools, of which there are none here."""
    answer = ask(client, max_tokens=2, image_first=True).choices[0].message
    assert answer.content == ""


def test_modalities(sampler):
    assert options_of(sampler, modalities=["text"]).max_images == 0
    assert options_of(sampler, modalities=["text"], max_images=3).max_images == 0
    assert options_of(sampler, modalities=["text", "image"]).max_images is None
    for wrong, message in ((["text", "audio"], "modalities must be"), ([], "modalities must be"), ("text", "a list")):
        with pytest.raises(ApiError, match=message):
            options_of(sampler, modalities=wrong)
    with pytest.raises(ApiError, match="modalities or max_images"):
        options_of(sampler, modalities=["text"], image_first=True)


def test_a_server_for_text(sampler):
    """--max-images 0: no answer draws, the rows have no guidance branch, and the page shows its chat alone."""
    with served(sampler, replace(LIMITS, max_images=0)) as (server, address):
        client = openai_client(address)
        [model] = client.models.list().data
        assert not model.drawing and server.worker.program.lanes == 1
        content = [image_part(data_url(Pillow.new("L", (6, 4)))), {"type": "text", "text": "read"}]
        for asked in ({}, {"max_images": 5}):
            answer = ask(
                client, [{"role": "user", "content": content}], seed=5, temperature=1.5, max_tokens=60, **asked
            )
            assert all(part["type"] == "text" for part in answer.choices[0].message.parts)
        with pytest.raises(openai.BadRequestError, match="this server's max_images is 0"):
            ask(client, image_first=True)
    with pytest.raises(UserError, match="--max-images is 0"):
        Server(sampler, "tiny", replace(LIMITS, max_images=0, editing=True), "127.0.0.1", ())


def test_harmless_fields(sampler):
    function = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    given = options_of(sampler, top_k=-1, max_tokens=-1, max_completion_tokens=-1, tools=function, tool_choice="none")
    assert given == options_of(sampler)
    for fields, message in (
        ({"tools": function}, "'tools' is not supported"),
        ({"tools": function, "tool_choice": "auto"}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format 'json_object' is not supported, because"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
        ({"presence_penalty": 2.1}, "from -2 to 2"),
        ({"mm_processor_kwargs": {"fps": 2}}, "has 'fps', which is not supported"),
        ({"mm_processor_kwargs": {"min_pixels": 9, "max_pixels": 8}}, "min_pixels above max_pixels"),
        ({"chat_template_kwargs": {"chat_template": "{% for %}"}}, "no variable of a chat template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "no variable of a chat template"),
        ({"chat_template_kwargs": {"system": "<|im_end|>"}}, "may not hold"),
        ({"chat_template_kwargs": {"deep": [1]}}, "must be a text, a number"),
    ):
        with pytest.raises(ApiError, match=message):
            options_of(sampler, **fields)


def test_variables_of_the_chat_template():
    """The template reads them, and such a conversation is not continued from the caches of another."""
    tokenizer = deepcopy(tiny.tokenizer())
    tokenizer.chat_template = TEMPLATE.replace("assistant\n", "assistant\n{% if think %}draw {{ think }}{% endif %}")
    model = Sampler(tiny.MODEL, tiny.params(), tokenizer, tiny.CODEC, max_positions=256)
    with served(model) as (_, address):
        client = openai_client(address)
        for variables in ({}, {"think": "seven"}, {"think": None}):
            answer = ask(client, chat_template_kwargs=variables, **TEXT)
            document = chat(tokenizer, [("user", [Text("draw an eight")])], **variables)
            [want] = model.generate([document], SampleOptions(**TEXT))
            the_same(answer.choices[0].message.parts, want)
            assert answer.usage.prompt_tokens == len(model.encoder(document, closed=False)["tokens"])
            back = [*ASK, answer.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
            cached = ask(client, back, chat_template_kwargs=variables, **TEXT).usage.prompt_tokens_details.cached_tokens
            assert (cached > 0) == (not variables)


def test_penalties(client, sampler):
    for given in (dict(repetition_penalty=1.5), dict(presence_penalty=1.5), dict(frequency_penalty=-1.5)):
        [want] = sampler.generate([[Text("draw an eight")]], SampleOptions(**TEXT, **given))
        the_same(ask(client, **TEXT, **given).choices[0].message.parts, want)


def test_logprobs(client, sampler):
    """Greedy: each token is the first of its list; whole and streamed alike; as the sampler records them."""
    asked = dict(**TEXT, logprobs=True, top_logprobs=3)
    choice = ask(client, **asked).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") == choice.message.content
    assert all(e.top_logprobs[0].token == e.token and e.top_logprobs[0].logprob == e.logprob for e in entries)
    session = sampler.session(SampleOptions(**TEXT, logprobs=3), [0])
    session.read([[Text("draw an eight")]], room=session.to_write)
    session.write()
    want = np.asarray(session.rows.logprobs)[0]
    np.testing.assert_allclose([e.logprob for e in entries], want[: len(entries), 0], atol=1e-4)
    listed = [[t.logprob for t in e.top_logprobs] for e in entries]
    np.testing.assert_allclose(listed, want[: len(entries), 1:], atol=1e-4)
    streamed = [c.choices[0].logprobs for c in ask(client, stream=True, **asked)]
    assert [e for found in streamed if found for e in found.content] == entries
    alone = ask(client, **TEXT, logprobs=True).choices[0].logprobs.content
    assert [e.logprob for e in alone] == pytest.approx([e.logprob for e in entries]) and not alone[0].top_logprobs
    assert ask(client, **TEXT).choices[0].logprobs is None


def post(address: str, body: bytes, **headers) -> httpx.Response:
    return httpx.post(
        address + URL,
        content=body,
        headers={"Content-Type": "application/json", **headers},
        trust_env=False,
        timeout=60,
    )


def test_packed_bodies(address):
    """gzip; a small body that is large when it is unpacked is refused before all of it is."""
    body = json.dumps({"messages": ASK, "max_tokens": 1}).encode()
    gzipped = {"Content-Encoding": "gzip"}
    assert post(address, gzip.compress(body), **gzipped).status_code == 200
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < LIMITS.max_body
    for data, headers, status, message in (
        (bomb, gzipped, 413, "at most 200000 bytes"),
        (body, gzipped, 400, "not valid gzip"),
        (gzip.compress(body)[:-9], gzipped, 400, "not whole gzip"),
        (body, {"Content-Encoding": "br"}, 415, "send it as it is"),
    ):
        answer = post(address, data, **headers)
        assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_model_by_its_name(address, client):
    assert client.models.retrieve("tiny") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="no model 'huge/one'"):
        client.models.retrieve("huge/one")


def test_pages_of_other_sites(sampler, address):
    """Of those that --allow-origin names, with the headers that a page sends; answers that are errors, too."""
    asks = {
        "Origin": "https://a.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }  # fmt: skip
    with served(sampler, replace(LIMITS, origins=("https://a.example",)), key="key") as (_, allowing):
        with httpx.Client(base_url=allowing, trust_env=False) as http:
            allowed = http.options(URL, headers=asks)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == "https://a.example"
            assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
            refused = http.post(URL, json={}, headers={"Origin": "https://a.example"})
            assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
            other = http.options(URL, headers=asks | {"Origin": "https://b.example"})
            assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.options(address + URL, headers=asks, trust_env=False).headers


def test_a_long_queue(sampler):
    """More requests than wait decoded are answered; one too many is told how long the queue takes."""
    limits = replace(LIMITS, rows=2, max_queue=40)
    with served(sampler, limits) as (server, address):
        client, worker = openai_client(address), server.worker
        ask(client, max_tokens=2)
        leave = held(worker)
        with ThreadPoolExecutor(50) as pool:
            asked = [pool.submit(ask, client, max_tokens=2, seed=i) for i in range(42)]
            wait_until(lambda: httpx.get(f"{address}/health", trust_env=False).json()["waiting"] == 42)
            assert len(worker.waiting) == 2 + 8  # the others wait as they came, their pictures not decoded
            worker.seconds = 20.0
            late = post(address, b"{}")
            assert late.status_code == 429 and late.headers["retry-after"] == str(20 * 42 // 2)
            leave.set()
            assert all(a.result(120).choices for a in asked)
        assert worker.seconds < 20 and worker.seconds_to_wait(0) == 1 and worker.seconds_to_wait(10**6) == 600


def test_bytes_of_the_queue(sampler, monkeypatch):
    """Bodies are counted together while they are here, and no longer."""
    with served(sampler) as (server, address):
        room = server.room
        for _ in range(3):
            assert post(address, json.dumps({"messages": ASK, "max_tokens": 1}).encode()).status_code == 200
            assert room.used == 0
        monkeypatch.setattr(room, "most", 50)
        monkeypatch.setattr(server.worker, "seconds_to_wait", lambda ahead: 42 + ahead)
        late = post(address, b" " * 51)
        assert late.status_code == 429 and "50 bytes together" in late.json()["error"]["message"] and room.used == 0
        assert late.headers["retry-after"] == "42"


def test_a_line_lets_those_go_who_leave():
    """A client that goes while it waits takes no place, and the next one gets it."""

    async def story() -> list[str]:
        line, told = Line(1), []
        here = asyncio.get_running_loop().create_future

        async def enter(name: str, gone: asyncio.Future, leave: asyncio.Future) -> None:
            try:
                async with line.turn(gone):
                    told.append(name)
                    await leave
            except ClientDisconnect:
                told.append(f"{name} left")

        goes, stays = here(), here()
        tasks = [asyncio.create_task(enter(n, g, stays)) for n, g in (("a", here()), ("b", goes), ("c", here()))]
        while told != ["a"]:
            await asyncio.sleep(0)
        assert line.waiting == 2
        goes.set_result(None)
        while "b left" not in told:
            await asyncio.sleep(0)
        stays.set_result(None)
        await asyncio.gather(*tasks)
        assert line.waiting == 0
        return told

    assert asyncio.run(asyncio.wait_for(story(), 60)) == ["a", "b left", "c"]
