"""Chat and ranking requests: the JSON of a body becomes checked values. All functions here raise ApiError."""

import inspect
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from starflow2_jax.data.documents import Document
from starflow2_jax.sampling.rows import SampleOptions
from starflow2_jax.serving.errors import ApiError, bad
from starflow2_jax.serving.images import Budget, upload
from starflow2_jax.serving.messages import LATENTS, turns_of
from starflow2_jax.serving.request_limits import RequestLimits

# Fields that have no effect here.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning_effort", "verbosity", "prediction", "tool_choice"),
)
# Fields that are accepted with this value alone, which has no effect.
NEUTRAL = {
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    # Clients of other OpenAI-compatible servers send these.
    "length_penalty": 1,
    "min_p": 0,
    "best_of": 1,
    "num_beams": 1,
    "use_beam_search": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stop_token_ids": [],
}
TOP_LOGPROBS = 20  # most likely tokens that are listed with a token
# Fields with numbers, and with whole numbers: the least and the largest value.
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "image_temperature": (0, 10),
    "guidance": (0, 100),
    "image_guidance": (0, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
}
INTEGERS = {
    "max_tokens": (1, 2**31),
    "max_completion_tokens": (1, 2**31),
    "n": (1, 10**6),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (0, 10**6),
    "max_images": (0, 10**6),
    "top_logprobs": (0, TOP_LOGPROBS),
}
UNLIMITED = ("max_tokens", "max_completion_tokens", "top_k")  # fields in which other servers take -1 as no limit
FLAGS = ("stream", "image_first", "linear", "annealed", "logprobs")
OTHERS = ("model", "messages", "stop", "stream_options", "modalities", "chat_template_kwargs", "mm_processor_kwargs")
BOUNDS = ("min_pixels", "max_pixels")  # the fields of mm_processor_kwargs
# Not for requests: the tokenizer's own arguments, and what a template is always given.
RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
TEMPLATE_VALUES = (str, bool, int, float, NoneType)
JSON_TYPES = {bool: "true or false", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class ChatRequest:
    """A request for an answer to a conversation."""

    turns: list[tuple[str, Document]]  # role and content of each message
    options: SampleOptions
    max_tokens: int | None  # length of the answer in positions; None: the server's limit
    seeds: list[int]  # one for each choice
    stream: bool  # send the answer as events while the model writes it
    include_usage: bool  # send the counts of tokens at the end of a stream
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template


def chat_request(body: object, limits: RequestLimits) -> ChatRequest:
    """The body of a chat request, checked."""
    body = _fields(body, {*NUMBERS, *INTEGERS, *FLAGS, *OTHERS})
    given = {name: _number(body, name, *NUMBERS[name], (int, float)) for name in NUMBERS}
    whole = {name: _number(body, name, *INTEGERS[name], (int,)) for name in INTEGERS}
    most_images = 0 if _text_only(body) else limits.images_of(whole["max_images"])
    flags = {name: _typed(body, name, bool) or False for name in FLAGS}
    n = whole["n"] or 1
    if n > limits.max_choices:
        raise bad(f"n may be at most {limits.max_choices} on this server", "n")
    seed = secrets.randbits(32) if whole["seed"] is None else whole["seed"]
    if given["image_guidance"] is not None and not limits.editing:
        raise bad("image_guidance needs a server that was started with --editing", "image_guidance")
    if flags["image_first"] and not limits.draws:
        raise bad(f"{LATENTS}; leave image_first out", "image_first")
    if flags["image_first"] and most_images == 0:
        given_by = "this server's" if limits.max_images == 0 else "the request's modalities or"
        raise bad(f"image_first asks for an image, but {given_by} max_images is 0", "max_images")
    if whole["top_logprobs"] and not flags["logprobs"]:
        raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
    try:
        options = SampleOptions(
            **{name: value for name, value in given.items() if value is not None},
            **{name: flags[name] for name in ("image_first", "linear", "annealed")},
            top_k=whole["top_k"] or 0,
            max_images=most_images,
            logprobs=(whole["top_logprobs"] or 0) if flags["logprobs"] else None,
            stop=_stop(body),
        )
    except ValueError as error:
        raise bad(str(error)) from None
    extras = _typed(body, "stream_options", dict) or {}
    most, variables = whole["max_completion_tokens"] or whole["max_tokens"], _variables(body, limits)
    return ChatRequest(
        turns=turns_of(body.get("messages"), limits, most or limits.positions, variables, _bounds(body)),
        options=options,
        max_tokens=most,
        seeds=[(seed + i) % 2**32 for i in range(n)],
        stream=flags["stream"],
        include_usage=_typed(extras, "include_usage", bool) or False,
        variables=variables,
    )


def rank_request(body: object, limits: RequestLimits) -> tuple[np.ndarray, list[str], bool]:
    """The body of a ranking request, checked: the image, the captions, and whether to rank by the image's
    likelihood.
    """
    if not limits.reads:
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
    return upload(body.get("image"), "flow", limits, "image").decode(Budget(limits)), captions, by == "image"


def _fields(body: object, known: set[str]) -> dict:
    """The body, if all its fields are known or have no effect."""
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    for name, value in body.items():
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in ("tools", "functions") and body.get("tool_choice", body.get("function_call")) == "none":
            continue
        if name == "response_format":
            kind = value.get("type") if isinstance(value, dict) else value
            raise bad(
                f"response_format {kind!r} is not supported, because nothing here binds the model to a format; leave "
                f"it out, and ask for the format in the prompt",
                name,
                "unsupported_parameter",
            )
        if name not in known and name not in IGNORED:
            raise bad(f"{name!r} is not supported by this server; leave it out", name, "unsupported_parameter")
    return {name: value for name, value in body.items() if not (name in UNLIMITED and value == -1)}


def _text_only(body: dict) -> bool:
    """Whether the request's modalities leave pictures out."""
    modalities = _typed(body, "modalities", list)
    if modalities is None:
        return False
    if not modalities or not all(each in ("text", "image") for each in modalities):
        raise bad('modalities must be ["text"], or ["text", "image"]', "modalities")
    return "image" not in modalities


def _variables(body: dict, limits: RequestLimits) -> dict[str, Any]:
    """The variables for the chat template."""
    variables = _typed(body, "chat_template_kwargs", dict) or {}
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name}"
        if name in RESERVED or not name.isidentifier():
            raise bad(f"{name!r} is no variable of a chat template that a request may set; leave it out", where)
        if not isinstance(value, TEMPLATE_VALUES):
            raise bad(f"{where} must be a text, a number, true, false or null", where, "invalid_type")
        limits.check_text(str(value), limits.max_text, where)
    return variables


def _bounds(body: dict) -> tuple[int | None, int | None]:
    """The least and the most pixels of pictures that the vision tower sees; None: the server's."""
    given = _typed(body, "mm_processor_kwargs", dict) or {}
    if other := sorted(given.keys() - set(BOUNDS)):
        raise bad(
            f"mm_processor_kwargs has {other[0]!r}, which is not supported; set {' or '.join(BOUNDS)}",
            "mm_processor_kwargs",
        )
    least, most = (_number(given, name, 1, 10**9, (int,)) for name in BOUNDS)
    if least and most and least > most:
        raise bad("mm_processor_kwargs has min_pixels above max_pixels", "mm_processor_kwargs")
    return least, most


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


def check_model(body: object, name: str) -> None:
    """Refuse a request for another model than `name`."""
    if isinstance(body, dict) and (asked := body.get("model") or name) != name:
        raise ApiError(404, f"this server has no model {asked!r}; its model is {name!r}", "model_not_found", "model")
