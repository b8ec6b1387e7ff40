"""Events of an answer -> OpenAI's chat completion objects, whole or as server-sent events.

The message's `content` holds the text, `images` the pictures (image_url parts with data URLs), and `parts` both, in the
order of the answer. A stream sends `delta.content`, `delta.images` and, while the model writes an image,
`delta.image_progress` {"index", "fraction"}.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import ClientDisconnect

from starflow2_jax.sampling.events import End, Event, Picture, Progress, Words
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.images import to_url
from starflow2_jax.serving.jobs import ScoredWords, Started


async def whole(story: AsyncIterator[Event], first: Started, frame: dict, choices: int, logprobs: bool = False) -> dict:
    """The chat.completion object of a whole answer.

    `story`: the events after `first`. `frame`: "id", "created" and "model". `choices`: number of answers. `logprobs`:
    list the log-probabilities of text tokens.
    """
    parts: list[list[dict]] = [[] for _ in range(choices)]
    scores: list[list[dict]] = [[] for _ in range(choices)]
    ends: dict[int, End] = {}
    async for event in story:
        if isinstance(event, Words):
            scores[event.choice] += _scores(event)
            mine = parts[event.choice]
            if mine and mine[-1]["type"] == "text":
                mine[-1]["text"] += event.text
            else:
                mine.append({"type": "text", "text": event.text})
        elif isinstance(event, Picture):
            parts[event.choice].append(_picture(event))
        elif isinstance(event, End):
            ends[event.choice] = event
    listed = [_choice(i, mine, ends[i].reason) for i, mine in enumerate(parts)]
    for choice in listed:
        choice["logprobs"] = {"content": scores[choice["index"]]} if logprobs else None
    return {**frame, "object": "chat.completion", "choices": listed, "usage": _usage(first, list(ends.values()))}


def _choice(index: int, parts: list[dict], reason: str) -> dict:
    text = "".join(p["text"] for p in parts if p["type"] == "text")
    images = [p for p in parts if p["type"] == "image_url"]
    message = {"role": "assistant", "content": text, "parts": parts} | ({"images": images} if images else {})
    return {"index": index, "message": message, "finish_reason": reason}


def _picture(event: Picture) -> dict:
    return {"type": "image_url", "image_url": {"url": to_url(event.pixels)}, "index": event.image}


def _usage(first: Started, ends: list[End]) -> dict:
    written = sum(end.tokens for end in ends)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": first.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": first.cached},
    }


async def stream(
    story: AsyncGenerator[Event, None], first: Started, frame: dict, include_usage: bool
) -> AsyncIterator[str]:
    """Yields chat.completion.chunk objects as server-sent events. The arguments are those of `whole`.

    `include_usage`: send the counts of tokens at the end. If the model fails on the way, the last event is {"error":
    ...}.
    """
    frame, ends, greeted = {**frame, "object": "chat.completion.chunk"}, [], set()
    try:
        async for event in story:
            delta, reason = _delta(event), None
            if event.choice not in greeted:
                greeted.add(event.choice)
                delta = {"role": "assistant", "content": "", **delta}
            if isinstance(event, End):
                ends.append(event)
                reason = event.reason
            scores = {"content": _scores(event)} if isinstance(event, ScoredWords) else None
            yield _line(frame, [{"index": event.choice, "delta": delta, "finish_reason": reason, "logprobs": scores}])
        if include_usage:
            yield _line(frame | {"usage": _usage(first, ends)}, [])
        yield "data: [DONE]\n\n"
    except ClientDisconnect:
        return
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        await story.aclose()


def _scores(event: Words) -> list[dict]:
    return list(event.scores) if isinstance(event, ScoredWords) else []


def _delta(event: Words | Progress | Picture | End) -> dict:
    if isinstance(event, Words):
        return {"content": event.text}
    if isinstance(event, Progress):
        return {"image_progress": {"index": event.image, "fraction": event.fraction}}
    return {"images": [_picture(event)]} if isinstance(event, Picture) else {}


def _line(frame: dict, choices: list[dict]) -> str:
    return f"data: {json.dumps({**frame, 'choices': choices})}\n\n"
