"""The server as its clients have it: real HTTP, the openai package, the tiny random model."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import jax
import numpy as np
import openai
import pytest
import tiny
from live import (
    ASK,
    KEY,
    LIMITS,
    TEMPLATE,
    ask,
    data_url,
    image_part,
    openai_client,
    pixels_of,
    served,
    the_same,
)
from PIL import Image as Pillow

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.images import as_pillow
from starflow2_jax.data.tokenizer import chat
from starflow2_jax.models.jacobi import Jacobi
from starflow2_jax.parallel.sharding import make_mesh, tree_shardings
from starflow2_jax.sampling import steps
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import Answer, Words
from starflow2_jax.sampling.inversion import Inversion
from starflow2_jax.sampling.scoring import rank

N = tiny.CONFIG.tokens


def test_text_and_images_out_are_the_samplers(client, sampler):
    answer = ask(
        client,
        max_tokens=30,
        seed=5,
        temperature=0.8,
        image_first=True,
        guidance=1.5,
        max_images=1,
        image_temperature=0.5,
    )
    options = SampleOptions(0.8, 0.5, 1.5, 30, image_first=True, max_images=1)
    [want] = sampler.generate([[Text("draw an eight")]], options, seed=5)
    message = answer.choices[0].message
    the_same(message.parts, want)
    assert message.images == [p for p in message.parts if p["type"] == "image_url"] and len(message.images) == 1
    assert answer.usage.prompt_tokens == len(sampler.tokenizer.encode("draw an eight"))
    assert answer.usage.completion_tokens == 30 and answer.choices[0].finish_reason == "length"
    assert client.models.list().data[0].id == "tiny"


def test_image_in(client, sampler):
    scan = as_pillow(tiny.pixels(3))
    messages = [{"role": "user", "content": [image_part(data_url(scan)), {"type": "text", "text": "mirror it"}]}]
    answer = ask(client, messages, max_tokens=N + 6, seed=2, image_first=True)
    given = Image(np.asarray(scan, np.float32)[..., None] / 127.5 - 1)
    options = SampleOptions(max_tokens=N + 6, image_first=True)
    [want] = sampler.generate([[given, Text("mirror it")]], options, seed=2)
    the_same(answer.choices[0].message.parts, want)
    other = [{"role": "user", "content": [image_part(data_url(as_pillow(-tiny.pixels(3)))), messages[0]["content"][1]]}]
    assert (
        ask(client, other, max_tokens=N + 6, seed=2, image_first=True).choices[0].message.images
        != answer.choices[0].message.images
    )
    deep = Pillow.fromarray(np.asarray(scan, np.uint16) * 257)  # 16 bits a level
    messages[0]["content"][0] = image_part(data_url(deep))
    again = ask(client, messages, max_tokens=N + 6, seed=2, image_first=True)
    the_same(again.choices[0].message.parts, want)
    large = scan.resize((60, 40)), scan.resize((40, 60))
    for image, via in zip(large, ("flow", "vit"), strict=True):  # of any size: scaled, or seen by the vision tower
        seen = [{"role": "user", "content": [image_part(data_url(image), via=via), {"type": "text", "text": "read"}]}]
        assert ask(client, seen, max_tokens=3, max_images=0).usage.completion_tokens >= 1
    back = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "and now?"}]
    assert ask(client, back, max_tokens=2).usage.prompt_tokens > answer.usage.prompt_tokens + N


def test_a_chat_template_and_jacobi_passes():
    """A server that is warm, solves for three image tokens at once, and whose tokenizer has a chat template."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = TEMPLATE
    model = Sampler(tiny.MODEL, tiny.params(), tokenizer, tiny.CODEC, max_positions=256)
    before = steps.read._cache_size(), steps.write._cache_size()
    with served(model, replace(LIMITS, rows=2, jacobi=3), warm=True) as (server, address):
        programs = steps.read._cache_size(), steps.write._cache_size()
        noted = [name for name, *_ in model.programs]
        assert programs == (before[0] + noted.count("read"), before[1] + noted.count("write"))
        answer = ask(openai_client(address), max_tokens=N + 4, seed=5, image_first=True, n=2)
        assert (steps.read._cache_size(), steps.write._cache_size()) == programs  # it had compiled all that this takes
        assert len(model.programs) == len(noted) and noted.count("decode") == 2  # two images at once, too
    document = chat(tokenizer, [("user", [Text("draw an eight")])])
    [want] = model.generate([document], SampleOptions(max_tokens=N + 4, image_first=True, jacobi=3), seed=5)
    the_same(answer.choices[0].message.parts, want)
    assert answer.usage.prompt_tokens == len(model.encoder(document, closed=False)["tokens"])


@pytest.mark.parametrize("how", ("calibrated", "tensor"))
def test_a_model_that_is_calibrated_or_cut_over_devices(how):
    mesh = make_mesh(data=1, fsdp=1, tensor=2, devices=jax.devices()[:2]) if how == "tensor" else None
    params = jax.device_put(tiny.params(), tree_shardings(tiny.params(), mesh)) if mesh else tiny.params()
    solvers = Inversion(deep=Jacobi(4, 0.3)) if how == "calibrated" else Inversion()
    model = Sampler(tiny.MODEL, params, tiny.tokenizer(), tiny.CODEC, max_positions=256, mesh=mesh, inversion=solvers)
    options = dict(max_tokens=N + 4, image_first=True, guidance=1.0, max_images=1)
    with served(model) as (server, address):
        assert server.worker.program.jacobi == (4 if how == "calibrated" else 1)
        answer = ask(openai_client(address), seed=5, temperature=0, **options)
    if how == "tensor":
        model = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    [want] = model.generate([[Text("draw an eight")]], SampleOptions(temperature=0, **options), seed=5)
    the_same(answer.choices[0].message.parts, want)


def test_stream_tells_the_same(client):
    options = dict(max_tokens=40, seed=7, image_first=True, max_images=1)
    whole = ask(client, **options)
    text, images, fractions, reasons, usage = "", [], [], [], None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            images += getattr(choice.delta, "images", [])
            fractions += [p["fraction"] for p in [getattr(choice.delta, "image_progress", None)] if p]
            reasons += [choice.finish_reason] if choice.finish_reason else []
    message = whole.choices[0].message
    assert text == (message.content or "") and images == message.images and usage == whole.usage
    assert fractions == [3 / N] and reasons == ["length"]  # a chunk is four positions, <|vision_start|> is the first


def test_choices(client):
    three = ask(client, max_tokens=12, n=3, seed=4, max_images=0)
    alone = [ask(client, max_tokens=12, seed=4 + i, max_images=0) for i in range(3)]
    texts = [c.message.content for c in three.choices]
    assert texts == [a.choices[0].message.content for a in alone] and len(set(texts)) == 3
    assert three.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)
    greedy = [ask(client, max_tokens=6, temperature=0, seed=s, max_images=0).choices[0].message.content for s in (1, 2)]
    narrow = ask(client, max_tokens=6, top_p=0, seed=3, max_images=0).choices[0].message.content
    assert greedy[0] == greedy[1] == narrow


def test_stop(client):
    options = dict(max_tokens=30, seed=3, max_images=0)
    full = ask(client, **options)
    text = full.choices[0].message.content
    cut = ask(client, stop=["@@@", text[8:10]], **options)
    assert cut.choices[0].message.content == text[: text.index(text[8:10])] and cut.choices[0].finish_reason == "stop"
    assert 0 < cut.usage.completion_tokens < full.usage.completion_tokens
    chunks = ask(client, stop=text[8:10], stream=True, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut.choices[0].message.content


@pytest.mark.parametrize(
    "stop, text, told", [("結束", "abc結束", "abc"), ("e🙂", "one🙂", "on"), ("e🙂", "one🙃", "one🙃")]
)
def test_a_stop_string_is_not_told_while_a_character_is_half_written(sampler, stop, text, told):
    """Token by token; each of these characters is several."""
    tokens = np.array(sampler.tokenizer.encode(text))
    assert len(tokens) > len(text)
    answer = Answer(0, sampler.tokenizer, N, sampler.ids.end, (stop,))
    events = [e for k in range(1, len(tokens) + 1) for e in answer.read(tokens[:k], k == len(tokens), {})]
    assert "".join(e.text for e in events if isinstance(e, Words)) == told
    assert events[-1].reason == ("length" if told == text else "stop")


def test_alone_and_in_company(client, running):
    """More requests than rows, of every kind, all at once: each answer as if alone."""
    kinds = [
        dict(max_tokens=5 + 9 * i, seed=i, temperature=[0, 0.7, 1.3][i % 3], image_first=i % 2 == 0, guidance=i % 3, top_p=1 - 0.1 * i)
        for i in range(6)
    ]  # fmt: skip
    prompts = [[{"role": "user", "content": "draw " * (1 + 7 * i)}] for i in range(6)]
    alone = [ask(client, p, **k).choices[0].message.parts for p, k in zip(prompts, kinds, strict=True)]
    with ThreadPoolExecutor(6) as pool:
        company = list(
            pool.map(lambda pk: ask(client, pk[0], **pk[1]).choices[0].message.parts, zip(prompts, kinds, strict=True))
        )
    for one, many in zip(alone, company, strict=True):
        assert [p.get("text") for p in one] == [p.get("text") for p in many]
        for a, b in zip(one, many, strict=True):
            if a["type"] == "image_url":
                np.testing.assert_allclose(
                    pixels_of(a["image_url"]["url"]), pixels_of(b["image_url"]["url"]), atol=0.02
                )


BAD = [
    ({"messages": []}, 400, "at least one message"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "a part is"),
    ({"messages": [{"role": "user", "content": [image_part("https://example.com/a.png")]}]}, 400, "fetches no addresses"),
    ({"messages": [{"role": "user", "content": [image_part("data:image/png;base64,!!")]}]}, 400, "not valid base64"),
    ({"messages": [{"role": "user", "content": [image_part("data:image/png;base64,AAAA")]}]}, 400, "cannot be read"),
    ({"messages": [{"role": "user", "content": [image_part("data:text/plain;base64,AAAA")]}]}, 400, "base64 data URL"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "last message"),
    ({"messages": [{"role": "user", "content": "draw " * 300}]}, 400, "leaves none of the 256"),
    ({"temperature": "hot"}, 400, "temperature must be a number"),
    ({"temperature": -1}, 400, "temperature must be from"),
    ({"guidance": float("nan")}, 400, "guidance must be a number"),
    ({"max_tokens": 1.5}, 400, "whole number"),
    ({"max_tokens": 0}, 400, "max_tokens must be from 1"),
    ({"max_tokens": 10**400}, 400, "max_tokens must be from 1"),
    ({"temperature": 10**400}, 400, "temperature must be from"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "not valid Unicode"),
    ({"\ud800": 1}, 400, "not valid Unicode"),
    ({"messages": [{"role": "user", "content": "a <|vision_start|>"}]}, 400, "may not hold '<|vision_start|>'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("hi<|im_", "end|>")]}]}, 400, "<|im_end|>"),
    ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "characters together; shorten the prompt"),
    ({"image_guidance": 1.0}, 400, "started with --editing"),
    ({"linear": 1}, 400, "linear has the wrong type"),
    ({"guidence": 1.0}, 400, "'guidence' is not supported"),
    ({"n": 4}, 400, "n may be at most 3"),
    ({"stop": [1]}, 400, "stop must be"),
    ({"stream": "yes"}, 400, "wrong type"),
    ({"image_first": True, "max_images": 0}, 400, "max_images is 0"),
    ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
    ({"model": "huge"}, 404, "no model 'huge'"),
]  # fmt: skip


@pytest.mark.parametrize("change, status, message", BAD)
def test_bad_requests(address, change, status, message):
    body = json.dumps({"model": "tiny", "messages": ASK, "max_tokens": 4, **change})
    answer = httpx.post(
        f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, trust_env=False
    )
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"] and error["type"] == "invalid_request_error"


def test_null_is_what_is_not_given(address):
    body = {"messages": ASK, "max_tokens": 1} | dict.fromkeys(("model", "stop", "seed", "n", "tools", "stream_options"))
    assert httpx.post(f"{address}/v1/chat/completions", json=body, trust_env=False, timeout=60).status_code == 200


def test_bad_http(address):
    with httpx.Client(base_url=address, trust_env=False) as http:
        url = "/v1/chat/completions"
        found = [
            http.post(url, content=b"{", headers={"Content-Type": "application/json"}),
            http.post(url, content=b"[" * 100_000, headers={"Content-Type": "application/json"}),
            http.post(url, content=b"{}", headers={"Content-Type": "text/plain"}),
            http.post(url, content=b" " * 300_000, headers={"Content-Type": "application/json"}),
            http.get(url),
            http.get("/v1/nothing"),
        ]
        assert [f.status_code for f in found] == [400, 400, 400, 413, 405, 404]
        assert all(f.json()["error"]["message"] for f in found)
        health = http.get("/health").json()
        assert health.pop("programs") > 0 and health == {"status": "ok", "running": 0, "waiting": 0}
        assert "default-src 'none'" in http.get("/").headers["content-security-policy"]


def test_oversized_images(client):
    """Refused by its header: a picture of 400 million pixels is never decoded."""
    for image in (Pillow.new("1", (20_000, 20_000)), Pillow.new("L", (101, 100))):
        with pytest.raises(openai.APIStatusError, match="10000 pixels together") as refused:
            ask(client, [{"role": "user", "content": [image_part(data_url(image))]}])
        assert refused.value.status_code == 413
    pairs = {via: [image_part(data_url(Pillow.new("L", (90, 90))), via=via)] * 2 for via in ("flow", "vit")}
    assert ask(client, [{"role": "user", "content": pairs["flow"]}], max_tokens=1).usage  # kept with the model's size
    with pytest.raises(openai.APIStatusError, match="together"):  # kept as far as the row holds them
        ask(client, [{"role": "user", "content": pairs["vit"]}], max_tokens=1)


def test_rank(address, sampler):
    scan = as_pillow(tiny.pixels(3))
    body = {"image": data_url(scan), "captions": ["draw an eight", "a seven"]}
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as http:
        answer = http.post("/v1/rank", json=body).json()["data"]
        assert http.post("/v1/rank", json=body | {"captions": []}).status_code == 400
        long = http.post("/v1/rank", json=body | {"captions": ["draw " * 300]})
        assert long.status_code == 400 and long.json()["error"]["param"] == "captions"
    want = rank(sampler, np.asarray(scan, np.float32)[..., None] / 127.5 - 1, body["captions"])
    assert [a["caption"] for a in answer] == [caption for caption, _ in want]
    np.testing.assert_allclose([a["nats"] for a in answer], [nats for _, nats in want], rtol=1e-3)


def test_key(sampler):
    with served(sampler, key=KEY) as (_, address), httpx.Client(base_url=address, trust_env=False) as http:
        right = {"Authorization": f"Bearer {KEY}".encode()}
        wrong = [{}, {"Authorization": "Bearer sesame"}, {"Authorization": "Bearer x"}]
        for url, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/v1/rank", "POST")):
            answers = [http.request(method, url, headers=h) for h in wrong]
            assert [a.status_code for a in answers] == [401] * 3
            assert answers[0].json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers=right).status_code == 200 == http.get("/health").status_code
