"""Chat and ranking requests: the JSON of a body becomes checked values. All functions here raise ApiError."""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.sampling.prompts import texts
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.serving.errors import ApiError, bad
from starflow2_jax.serving.images import Budget, from_url
from starflow2_jax.serving.request_limits import RequestLimits

ROLES = ("system", "developer", "user", "assistant")
# Fields that have no effect here.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("modalities", "reasoning_effort", "verbosity", "prediction", "tool_choice"),
)
# Fields that are accepted with this value alone, which has no effect.
NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    # Clients of other OpenAI-compatible servers send these.
    "repetition_penalty": 1,
    "length_penalty": 1,
    "min_p": 0,
    "best_of": 1,
    "num_beams": 1,
    "use_beam_search": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stop_token_ids": [],
}
# Fields with numbers, and with whole numbers: the least and the largest value.
NUMBERS = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "image_temperature": (0, 10),
    "guidance": (0, 100),
    "image_guidance": (0, 100),
}
INTEGERS = {
    "max_tokens": (1, 2**31),
    "max_completion_tokens": (1, 2**31),
    "n": (1, 10**6),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (0, 10**6),
    "max_images": (0, 10**6),
}
FLAGS = ("stream", "image_first", "linear", "annealed")
OTHERS = ("model", "messages", "stop", "stream_options")
JSON_TYPES = {bool: "true or false", dict: "an object", list: "a list"}
LATENTS = "this model's own images are latents, not pictures"


@dataclass(frozen=True)
class ChatRequest:
    """A request for an answer to a conversation."""

    turns: list[tuple[str, Document]]  # role and content of each message
    options: SampleOptions
    max_tokens: int | None  # length of the answer in positions; None: the server's limit
    seeds: list[int]  # one for each choice
    stream: bool  # send the answer as events while the model writes it
    include_usage: bool  # send the counts of tokens at the end of a stream


def chat_request(body: object, limits: RequestLimits) -> ChatRequest:
    """The body of a chat request, checked."""
    body = _fields(body, {*NUMBERS, *INTEGERS, *FLAGS, *OTHERS})
    given = {name: _number(body, name, *NUMBERS[name], (int, float)) for name in NUMBERS}
    whole = {name: _number(body, name, *INTEGERS[name], (int,)) for name in INTEGERS}
    flags = {name: _typed(body, name, bool) or False for name in FLAGS}
    n = whole["n"] or 1
    if n > limits.max_choices:
        raise bad(f"n may be at most {limits.max_choices} on this server", "n")
    seed = secrets.randbits(32) if whole["seed"] is None else whole["seed"]
    if given["image_guidance"] is not None and not limits.editing:
        raise bad("image_guidance needs a server that was started with --editing", "image_guidance")
    if flags["image_first"] and not limits.draws:
        raise bad(f"{LATENTS}; leave image_first out", "image_first")
    if flags["image_first"] and whole["max_images"] == 0:
        raise bad("image_first asks for an image, but max_images is 0", "max_images")
    try:
        options = SampleOptions(
            **{name: value for name, value in given.items() if value is not None},
            **{name: flags[name] for name in ("image_first", "linear", "annealed")},
            top_k=whole["top_k"] or 0,
            max_images=whole["max_images"] if limits.draws else 0,
            stop=_stop(body),
        )
    except ValueError as error:
        raise bad(str(error)) from None
    extras = _typed(body, "stream_options", dict) or {}
    return ChatRequest(
        turns=_turns(body.get("messages"), limits),
        options=options,
        max_tokens=whole["max_completion_tokens"] or whole["max_tokens"],
        seeds=[(seed + i) % 2**32 for i in range(n)],
        stream=flags["stream"],
        include_usage=_typed(extras, "include_usage", bool) or False,
    )


def rank_request(body: object, limits: RequestLimits) -> tuple[np.ndarray, list[str], bool]:
    """The body of a ranking request, checked: the image, the captions, and whether to rank by the image's likelihood."""
    if not limits.draws:
        raise bad(f"{LATENTS}, so it cannot rank captions of a picture")
    body = _fields(body, {"model", "image", "captions", "by"})
    captions = _typed(body, "captions", list)
    if not captions or len(captions) > 64 or not all(isinstance(c, str) and c.strip() for c in captions):
        raise bad("captions must be a list of 1 to 64 texts, none of them empty", "captions")
    if (by := body.get("by", "image")) not in ("image", "text"):
        raise bad('by must be "image" or "text"', "by")
    room = limits.max_text
    for i, caption in enumerate(captions):
        limits.check_text(caption, room, f"captions[{i}]")
        room -= len(caption)
    return from_url(body.get("image"), "flow", Budget(limits), "image"), captions, by == "image"


def _fields(body: object, known: set[str]) -> dict:
    """The body, if all its fields are known or have no effect."""
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    for name, value in body.items():
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name not in known and name not in IGNORED:
            raise bad(f"{name!r} is not supported by this server; leave it out", name, "unsupported_parameter")
    return body


def _typed(body: dict, name: str, kind: type) -> Any:
    """The field's value, which is of this type, or None."""
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise bad(f"{name} has the wrong type; it must be {JSON_TYPES[kind]}", name, "invalid_type")
    return value


def _number(body: dict, name: str, least: float, most: float, kinds: tuple[type, ...]) -> Any:
    """The field's value, which is a finite number of one of these types from `least` to `most`, or None."""
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise bad(f"{name} must be a {'whole ' if kinds == (int,) else ''}number", name, "invalid_type")
    if not least <= value <= most:
        raise bad(f"{name} must be from {least} to {most}", name)
    return value


def _stop(body: dict) -> tuple[str, ...]:
    """The strings that end an answer."""
    stop = body.get("stop")
    strings = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or len(strings) > 4 or not all(isinstance(s, str) and s for s in strings):
        raise bad("stop must be a text or a list of up to 4 texts, none of them empty", "stop")
    return tuple(strings)


def _turns(messages: object, limits: RequestLimits) -> list[tuple[str, Document]]:
    """The role and the content of each message."""
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a list of at least one message", "messages")
    budget, turns, room = Budget(limits), [], limits.max_text
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise bad(f"the role of a message must be one of {', '.join(ROLES)}", f"{where}.role")
        role = "system" if message["role"] == "developer" else message["role"]
        drawn = role == "assistant" and limits.draws  # images that the model drew are flow tokens
        default = "flow" if drawn else limits.images
        document = [
            _part(part, limits, budget, default, f"{where}.content[{k}]")
            for k, part in enumerate(_content(message, where))
        ]
        for text in texts(document):
            limits.check_text(text, room, where)
            room -= len(text)
        turns.append((role, document))
    if turns[-1][0] == "assistant":
        raise bad("the last message must not be the assistant's; end with the message to answer", "messages")
    return turns


def _content(message: dict, where: str) -> list:
    """The parts of a message. Clients may send back the `parts` or the `images` of an earlier answer as they are."""
    content = message.get("parts") or message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list):
        raise bad("content must be a text or a list of parts", f"{where}.content")
    if "parts" not in message:
        images = message.get("images") or []
        if not isinstance(images, list):
            raise bad("images must be a list of image_url parts", f"{where}.images")
        parts = parts + images
    return parts


def _part(part: object, limits: RequestLimits, budget: Budget, via: str, where: str) -> Text | Image:
    """A part of a message. `via`: how the model sees an image that does not say it. `where`: the part's place."""
    fields: dict = part if isinstance(part, dict) else {}
    kind, text, image = fields.get("type"), fields.get("text"), fields.get("image_url")
    if kind == "text" and isinstance(text, str):
        return Text(text)
    if kind != "image_url" or not isinstance(image, dict):
        raise bad('a part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}', where)
    if not limits.draws and not limits.vision:
        raise bad(f"{LATENTS}, and it has no vision tower to see yours; send text alone", where)
    via = image.get("via", via)
    if via == "flow" and not limits.draws:
        raise bad(f"{LATENTS}; leave via out, so that its vision tower reads yours", f"{where}.image_url.via")
    if via not in ("flow", "vit") or (via == "vit" and not limits.vision):
        raise bad('via must be "flow", or "vit" if the model has a vision tower', f"{where}.image_url.via")
    return Image(from_url(image.get("url"), via, budget, where), via=via)


def check_model(body: object, name: str) -> None:
    """Refuse a request for another model than `name`."""
    if isinstance(body, dict) and (asked := body.get("model") or name) != name:
        raise ApiError(404, f"this server has no model {asked!r}; its model is {name!r}", "model_not_found", "model")
