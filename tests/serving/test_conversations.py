"""A conversation over HTTP that goes on from its caches, against one in this process and against one that is read
anew.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
from live import LIMITS, TEMPLATE, ask, data_url, image_part, openai_client, pixels_of, served, the_same

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.images import as_pillow
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.serving import worker as worker_module
from starflow2_jax.serving.prompts import pieces

N = tiny.CONFIG.tokens
STILL = dict(temperature=0, image_temperature=0)  # nothing is random
DRAW = dict(max_tokens=N + 5, image_first=True, guidance=1.0)


def sampler(template: str | None) -> Sampler:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    return Sampler(tiny.MODEL, tiny.params(), tokenizer, tiny.CODEC, max_positions=256)


@pytest.fixture(scope="module", params=[TEMPLATE, None], ids=["template", "plain"])
def talking(request):
    model = sampler(request.param)
    with served(model, replace(LIMITS, keep=2)) as (server, address):
        yield model, server, openai_client(address)


@pytest.fixture(autouse=True)
def nothing_kept(talking):
    talking[1].worker.conversations.kept.clear()


def say(text: str, *images: str) -> dict:
    return {"role": "user", "content": [*map(image_part, images), {"type": "text", "text": text}]}


def cached(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def read(talking) -> np.ndarray:
    """Positions ever computed for the row that was kept last, one entry a lane."""
    *_, kept = talking[1].worker.conversations.kept.values()
    return np.asarray(kept.rows.computed)


@pytest.mark.parametrize("most", [N + 5, N + 1, 3])  # to the end of an image and beyond, just to its end, or amid it
def test_the_next_turn_reads_only_what_is_new(talking, most):
    """The same answers as `Chat` gives, at the price that it has; the page sends back `parts` alone, a client the
    message as it came.
    """
    model, _, client = talking
    scan = as_pillow(tiny.pixels(1))
    options = SampleOptions(0, 0, 1.0, most, image_first=True)
    chat = Chat(model, options)
    said = [Image(np.asarray(scan, np.float32)[..., None] / 127.5 - 1), Text("mirror it")]
    messages, answer = [say("mirror it", data_url(scan))], None
    for turn, text in enumerate(("", "and now?", "once more")):
        if turn:
            message = answer.choices[0].message.model_dump()
            mine = message if turn == 1 else {"role": "assistant", "parts": message["parts"]}
            messages += [mine, say(text)]
            said = [Text(text)]
        computed = int(chat.session.computed[0])
        if turn and not model.tokenizer.chat_template and int(chat.session.rows.token[0]) != model.ids.end:
            chat.session.read([[Text("<|im_end|>")]])  # the server closes what the model has said
        want = chat.say(said)
        answer = ask(client, messages, **STILL, **{**DRAW, "max_tokens": most})
        the_same(answer.choices[0].message.parts, want)
        usage = answer.usage
        assert read(talking)[0] == chat.session.computed[0] > computed
        assert usage.prompt_tokens + usage.completion_tokens == int(chat.session.rows.caches.length[0])
        assert (cached(answer) > 0) == (turn > 0)
        new = usage.prompt_tokens - cached(answer) + usage.completion_tokens
        assert new == chat.session.computed[0] - computed


def test_another_beginning_shares_nothing(talking):
    """What differs in an early message, in a role, in a pixel, or in what the model said is read anew."""
    client, image = talking[2], data_url(as_pillow(tiny.pixels(1)))
    messages = [{"role": "system", "content": "be brief"}, say("read it", image)]
    answer = ask(client, messages, **STILL, max_tokens=6, max_images=0)
    told = {"role": "assistant", "content": answer.choices[0].message.content}
    following = [*messages, told, say("and now?")]
    others = [
        [{"role": "system", "content": "be long"}, *following[1:]],
        [{"role": "user", "content": "be brief"}, *following[1:]],
        [following[0], say("read it", data_url(as_pillow(tiny.pixels(2)))), *following[2:]],
        [*following[:2], {"role": "assistant", "content": told["content"] + "."}, following[3]],
        [*following[:1], following[3]],
    ]
    for other in others:
        assert cached(ask(client, other, **STILL, max_tokens=2, max_images=0)) == 0
        talking[1].worker.conversations.kept.popitem()  # what was just kept
        assert len(talking[1].worker.conversations.kept) == 1
    assert cached(ask(client, following, **STILL, max_tokens=2, max_images=0)) > 0


def begun(talking) -> list[dict]:
    """A first turn whose answer is read again as the tokens that it was written in, which not all of a random model's
    are.
    """
    model, _, client = talking
    for seed in range(99):
        answer = ask(client, [say("draw an eight")], temperature=1, seed=seed, max_tokens=2, max_images=0)
        text = answer.choices[0].message.content or ""
        if text.isascii() and len(model.tokenizer.encode(text)) == answer.usage.completion_tokens == 2:
            return [say("draw an eight"), {"role": "assistant", "content": text}]
    raise AssertionError("there is no such answer")


def test_several_turns_may_come_at_once(talking):
    """What another model has answered in between is read as it was given."""
    client = talking[2]
    messages = [*begun(talking), say("why?"), {"role": "assistant", "content": "so"}, say("well")]
    again = ask(client, messages, **STILL, max_tokens=6, max_images=0)
    talking[1].worker.conversations.kept.clear()
    anew = ask(client, messages, **STILL, max_tokens=6, max_images=0)
    assert cached(again) > 0 == cached(anew)
    assert again.choices[0].message.content == anew.choices[0].message.content
    assert again.usage.prompt_tokens == anew.usage.prompt_tokens


def test_a_seed_means_the_same_with_and_without_the_caches(talking):
    client, options = talking[2], dict(max_tokens=12, max_images=0, seed=11)
    messages = [*begun(talking), say("why?")]
    again = ask(client, messages, n=2, **options)
    talking[1].worker.conversations.kept.clear()
    anew = ask(client, messages, n=2, **options)
    assert cached(again) > 0 == cached(anew)
    assert [c.message.content for c in again.choices] == [c.message.content for c in anew.choices]


def test_the_conversation_used_longest_ago_goes(talking):
    client, options = talking[2], dict(**STILL, max_tokens=3, max_images=0)

    def turn(messages: list) -> int:
        answer = ask(client, messages, **options)
        messages += [answer.choices[0].message.model_dump(), say("why?")]
        return cached(answer)

    one, two, kept = [say("one")], [say("two")], talking[1].worker.conversations.kept
    for number in range(3):  # as many in turn as are kept: what one was before its last turn goes first
        assert [turn(messages) > 0 for messages in (one, two)] == [number > 0] * 2
        assert len(kept) == 2
    turn([say("three")])  # now "one" has not been used for longest
    assert len(kept) == 2 and turn(two) > 0 == turn(one)


def test_what_a_stop_string_cut_is_not_kept(talking):
    """One that did not come cuts nothing."""
    options, kept = dict(**STILL, max_tokens=6, max_images=0), talking[1].worker.conversations.kept
    text = ask(talking[2], [say("one")], **options).choices[0].message.content
    kept.clear()
    assert ask(talking[2], [say("one")], **options, stop=text[1:]).choices[0].message.content == text[:1]
    assert not kept
    ask(talking[2], [say("one")], **options, stop="@@")
    assert len(kept) == 1


def test_a_template_that_rewrites_earlier_turns_is_read_anew():
    """Qwen3's drops what was thought in earlier turns; this one drops all but the last message's text."""
    model = sampler(TEMPLATE.replace("{{ c.text }}", "{% if loop.last %}{{ c.text[:3 + m.content|length] }}{% endif %}").replace(
        "{{ m.role }}", "{{ m.role }}{{ messages|length }}"
    ))  # fmt: skip
    with served(model, replace(LIMITS, keep=2)) as (_, address):
        client = openai_client(address)
        answer = ask(client, [say("one")], **STILL, max_tokens=3, max_images=0)
        told = {"role": "assistant", "content": answer.choices[0].message.content}
        assert cached(ask(client, [say("one"), told, say("why?")], **STILL, max_tokens=3, max_images=0)) == 0


def test_none_is_kept_where_none_is_wanted():
    with served(sampler(None), replace(LIMITS, keep=0)) as (server, address):
        ask(openai_client(address), [say("one")], max_tokens=3, max_images=0)
        assert not server.worker.conversations.kept


def test_pieces_of_a_prompt_are_the_prompt(monkeypatch):
    """Read in pieces of nine positions, rows of other requests going on in between, with images of both kinds."""
    scan = data_url(as_pillow(tiny.pixels(1)))
    content = [
        {"type": "text", "text": "draw an eight and read all of this first"}, image_part(scan), image_part(scan, via="vit"),
        {"type": "text", "text": "then"}, image_part(data_url(as_pillow(tiny.pixels(2))), via="vit"), image_part(scan),
        {"type": "text", "text": "mirror it, as it was said before all of that was there"},
    ]  # fmt: skip
    messages, options = [{"role": "user", "content": content}], dict(max_tokens=2 * N, seed=3, guidance=1.0)
    model, answers = sampler(TEMPLATE), []
    for most in (256, 9):
        monkeypatch.setattr(worker_module, "PIECE", most)
        with served(model) as (server, address):
            turns = []
            reader = server.worker.reader
            read = reader.read
            monkeypatch.setattr(reader, "read", lambda *a, read=read, turns=turns: (turns.append(a[3]), read(*a))[1])
            answers.append(ask(openai_client(address), messages, image_first=True, **options).choices[0].message.parts)
    lengths = [len(piece["tokens"]) for piece in turns]
    assert len(lengths) > 5 and max(lengths) < 9 + N + 2
    the_same_parts(*answers)
    document = [
        Text("draw " * 5),
        Image(tiny.pixels(1)),
        Text("x" * 20),
        Image(tiny.pixels(2, (8, 4)), via="vit"),
        Text("y"),
    ]
    whole = model.encoder(document, closed=False)
    for most in (1, 4, 7, 100):
        parts = list(pieces(whole, most))
        for name in ("tokens", "modality", "latents", "patches", "coordinates"):
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])
        offset, found = 0, []
        for part in parts:
            found.append(part["positions"] + offset)
            offset += part["positions"].max() + 1
        np.testing.assert_array_equal(np.concatenate(found), whole["positions"])


def the_same_parts(one: list[dict], other: list[dict]) -> None:
    assert [p.get("text") for p in one] == [p.get("text") for p in other]
    for a, b in zip(one, other, strict=True):
        if a["type"] == "image_url":
            np.testing.assert_allclose(pixels_of(a["image_url"]["url"]), pixels_of(b["image_url"]["url"]), atol=0.02)
