"""Requests as other people's programs send them, and the guidance of editing."""

import base64
import io
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import tiny
from live import LIMITS, ask, data_url, image_part, of_latents, openai_client, served, the_same
from PIL import Image as Pillow

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.images import as_pillow, from_pillow
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.serving.request_limits import RequestLimits
from starflow2_jax.serving.requests import chat_request
from starflow2_jax.serving.server import Server

N = tiny.CONFIG.tokens


def jpeg(size: tuple[int, int]) -> str:
    file = io.BytesIO()
    as_pillow(tiny.pixels(3)).resize(size).convert("RGB").save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def understanding(sampler):
    """A server whose images go through the vision tower unless they say otherwise."""
    with served(sampler, replace(LIMITS, images="vit")) as (_, address):
        yield address


def lmms_eval() -> dict:
    """lmms-eval's models/openai_compatible.py: the images, then the question; its default of 1024 new tokens."""
    images = [image_part(f"data:image/png;base64,{data_url(as_pillow(tiny.pixels(k))).split(',')[1]}") for k in (1, 2)]
    content = [*images, {"type": "text", "text": "which one is an eight?"}]
    return {
        "messages": [{"role": "user", "content": content}], "max_tokens": 1024, "temperature": 0, "model": "tiny",
    }  # fmt: skip


def vlmevalkit() -> dict:
    """VLMEvalKit's api/gpt.py: a system text, parts with `detail`, n, and what its configs pass on."""
    url = {"url": f"data:image/jpeg;base64,{jpeg((40, 60))}", "detail": "high"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "which digit is this?"}]
    messages = [{"role": "system", "content": "answer with one word"}, {"role": "user", "content": content}]
    return {
        "model": "tiny", "messages": messages, "n": 1, "temperature": 0, "max_tokens": 1024, "seed": 42,
        "presence_penalty": 0, "top_logprobs": None,
    }  # fmt: skip


def reasoning_client() -> dict:
    """What is sent to models that think: another name for max_tokens, hints that change nothing here."""
    return {
        "model": "tiny", "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "eight?"}],
        "max_completion_tokens": 4096, "reasoning_effort": "low", "response_format": {"type": "text"}, "tools": None,
        "stream_options": None, "something_new": None,
    }  # fmt: skip


@pytest.mark.parametrize("payload", [lmms_eval, vlmevalkit, reasoning_client])
def test_evaluation_harnesses(understanding, sampler, payload):
    body = payload()
    answer = httpx.post(f"{understanding}/v1/chat/completions", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    answer = answer.json()
    assert isinstance(answer["choices"][0]["message"]["content"], str | None)
    assert answer["usage"]["completion_tokens"] <= min(LIMITS.max_tokens, 256 - answer["usage"]["prompt_tokens"])
    if payload is vlmevalkit:  # seen whole by the tower, not cropped to the model's own size
        h, w = tiny.VISION.merged_grid((60, 40))
        texts = len(sampler.tokenizer.encode("answer with one word")) + len(
            sampler.tokenizer.encode("which digit is this?")
        )
        assert answer["usage"]["prompt_tokens"] == texts + 2 + h * w


def test_images_are_seen_as_the_server_is_told(understanding, address):
    """Unless they say so themselves; and what the model drew comes back as it was drawn."""
    scan = Pillow.new("L", (16, 16))
    flow, (h, w) = N + 2, tiny.VISION.merged_grid((16, 16))
    assert h * w + 2 != flow
    for place, via, positions in (
        (understanding, {}, h * w + 2), (understanding, {"via": "flow"}, flow), (address, {}, flow),
        (address, {"via": "vit"}, h * w + 2),
    ):  # fmt: skip
        content = [image_part(data_url(scan), **via), {"type": "text", "text": "!"}]
        answer = ask(openai_client(place), [{"role": "user", "content": content}], max_tokens=1, max_images=0)
        assert answer.usage.prompt_tokens == positions + 1
    drawn = {"role": "assistant", "parts": [image_part(data_url(scan))]}
    told = ask(openai_client(understanding), [drawn, {"role": "user", "content": "!"}], max_tokens=1, max_images=0)
    assert told.usage.prompt_tokens == flow + 2  # <|im_end|>


def test_a_tower_that_is_not_there(sampler):
    blind = replace(tiny.CONFIG, vlm=replace(tiny.CONFIG.vlm, vision=None))
    model = Sampler(Pretzel(blind), tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    with pytest.raises(UserError, match="--images vit needs a vision tower"):
        Server(model, "tiny", replace(LIMITS, images="vit"), "127.0.0.1", ())


def test_more_than_is_left_is_what_is_left(client):
    """max_tokens beyond the row or the server's limit is cut, as other servers do it."""
    for words, most, written in ((230, 10**6, 26), (10, 10**9, LIMITS.max_tokens)):
        messages = [{"role": "user", "content": "!" * words}]
        answer = ask(client, messages, max_tokens=most, image_first=True, temperature=0)
        ended = answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == written or (ended and answer.usage.completion_tokens < written)


@pytest.fixture(scope="module")
def editing(sampler):
    with served(sampler, replace(LIMITS, editing=True)) as (_, address):
        yield openai_client(address)


GUIDED = [
    dict(guidance=0.7, image_guidance=1.6), dict(guidance=0.7, image_guidance=1.6, linear=True),
    dict(image_guidance=2.0, annealed=True), dict(guidance=1.3), dict(guidance=1.3, linear=True, annealed=True), dict(),
]  # fmt: skip


@pytest.mark.parametrize("guided", GUIDED)
def test_guidance_of_an_edit(editing, client, sampler, guided):
    """As the sampler draws it; rows without `image_guidance` are beside those with it what they are elsewhere."""
    scan = as_pillow(tiny.pixels(3))
    content = [image_part(data_url(scan)), {"type": "text", "text": "mirror it"}]
    wanted = dict(max_tokens=N + 2, image_first=True)
    given = [Image(np.asarray(scan, np.float32)[..., None] / 127.5 - 1), Text("mirror it")]
    [want] = sampler.generate([given], SampleOptions(**wanted, **guided), seed=2)
    places = [editing] if "image_guidance" in guided else [editing, client]
    for place in places:
        answer = ask(place, [{"role": "user", "content": content}], seed=2, **wanted, **guided)
        the_same(answer.choices[0].message.parts, want)


def test_a_client_can_see_whether_it_may_edit(editing, client):
    assert [c.models.list().data[0].editing for c in (editing, client)] == [True, False]
    with pytest.raises(openai.BadRequestError, match="started with --editing"):
        ask(client, image_guidance=1.0)


@pytest.fixture(scope="module")
def latents():
    with served(of_latents(), warm=True) as (server, address):
        yield server, address


@pytest.mark.parametrize("payload", [lmms_eval, vlmevalkit, reasoning_client])
def test_a_model_of_latents_understands(latents, payload):
    """Images through the vision tower, text out, as the sampler has it."""
    answer = httpx.post(f"{latents[1]}/v1/chat/completions", json=payload(), trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert "images" not in message
    if payload is lmms_eval:
        images = [Image(from_pillow(as_pillow(tiny.pixels(k)).convert("RGB")), via="vit") for k in (1, 2)]
        left = 256 - answer.json()["usage"]["prompt_tokens"]
        options = SampleOptions(0, max_tokens=min(LIMITS.max_tokens, left), max_images=0)
        the_same(message["parts"], *of_latents().generate([[*images, Text("which one is an eight?")]], options))


def test_a_model_of_latents_draws_nothing(latents):
    server, address = latents
    client, scan = openai_client(address), data_url(as_pillow(tiny.pixels(3)))
    assert not client.models.list().data[0].drawing
    assert server.worker.program.lanes == 1 and not any(name == "decode" for name, *_ in server.worker.sampler.programs)
    for content, wanted, message in (
        ("!", dict(image_first=True), "leave image_first out"),
        ([image_part(scan, via="flow")], {}, "leave via out"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, [{"role": "user", "content": content}], **wanted)
    answer = httpx.post(f"{address}/v1/rank", json={"image": scan, "captions": ["an eight"]}, trust_env=False)
    assert answer.status_code == 400 and "it cannot rank captions" in answer.json()["error"]["message"]
    request_limits = RequestLimits.of(server.worker.sampler, max_pixels=10, max_choices=1)
    for given in (None, 3):
        body = {"messages": [{"role": "user", "content": "!"}], "max_images": given}
        assert chat_request(body, request_limits).options.max_images == 0
    told = {"role": "assistant", "content": [image_part(scan)]}  # somebody else's answer
    assert ask(client, [told, {"role": "user", "content": "!"}], max_tokens=1).usage
    with pytest.raises(UserError, match="--editing needs a model that draws"):
        Server(of_latents(), "tiny", replace(LIMITS, editing=True), "127.0.0.1", ())


def test_a_model_of_latents_without_a_tower():
    blind = replace(tiny.CONFIG, vlm=replace(tiny.CONFIG.vlm, vision=None))
    with served(of_latents(blind)) as (_, address):
        client = openai_client(address)
        for via in ({}, {"via": "vit"}, {"via": "flow"}):
            with pytest.raises(openai.BadRequestError, match="no vision tower to see yours"):
                content = [image_part(data_url(as_pillow(tiny.pixels(3))), **via)]
                ask(client, [{"role": "user", "content": content}])
        assert ask(client, max_tokens=2).choices
