"""The messages of a chat request become the turns of a conversation: texts, and images as the model sees them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.prompts import texts
from starflow2_jax.serving.errors import bad
from starflow2_jax.serving.images import Budget, Upload, fitted, upload
from starflow2_jax.serving.prompts import Turns
from starflow2_jax.serving.request_limits import RequestLimits

ROLES = ("system", "developer", "user", "assistant")
LATENTS = "this model reads latents, not pictures"
ANSWER = 8  # an eighth of a row is kept for the answer where pictures are scaled to what is left
Bounds = tuple[int | None, int | None]
Sent = list[tuple[str, list[Text | Upload]]]  # the turns before their images are decoded


def turns_of(
    messages: object, limits: RequestLimits, most: int, variables: Mapping[str, Any], pixels: Bounds = (None, None)
) -> Turns:
    """The role and the content of each message. Raises ApiError.

    `most`: positions that the answer may take. `variables`: values for the chat template. `pixels`: the least and the
    most pixels to which a picture of the vision tower is scaled; None: the server's limit.
    """
    sent = _sent(messages, limits)
    uploads = [part for _, said in sent for part in said if isinstance(part, Upload)]
    seen = [part for part in uploads if part.via == "vit"]
    shown = {}
    if seen and limits.vision:
        keep = min(most, max(limits.positions // ANSWER, 1))
        asked = _asked(limits.vision, pixels)
        room = limits.positions - keep - _without_pictures(sent, limits, variables)
        shown = dict(zip(seen, fitted(limits.vision, asked, seen, room, limits.positions), strict=True))
    budget = Budget(limits)
    decoded = {part: part.decode(budget, shown.get(part)) for part in uploads}

    def document(said: Sequence[Text | Upload]) -> Document:
        return [Image(decoded[part], via=part.via) if isinstance(part, Upload) else part for part in said]

    return [(role, document(said)) for role, said in sent]


def _asked(vision: VisionConfig, pixels: Bounds) -> VisionConfig:
    """The tower with the bounds of a request. Raises ApiError if they exceed the bounds of `vision`, the server's."""
    try:
        return vision.bounded(*pixels)
    except UserError as error:
        raise bad(str(error), "mm_processor_kwargs") from None


def _without_pictures(sent: Sent, limits: RequestLimits, variables: Mapping[str, Any]) -> int:
    """Positions that the conversation takes without the tower's tokens, chat template and markers of images
    included.
    """
    dot, count = np.zeros((1, 1, limits.channels), np.float32), 0
    turns: Turns = []
    for role, said in sent:
        document: Document = []
        for part in said:
            if isinstance(part, Text):
                document.append(part)
            elif part.via == "vit":
                count += 1
                document.append(Image(dot, via="vit"))
            else:
                document.append(Image(np.zeros(limits.latents, np.float32), encoded=True))
        turns.append((role, document))
    assert limits.vision
    return limits.length(turns, variables) - count * math.prod(limits.vision.merged_grid((1, 1)))


def _sent(messages: object, limits: RequestLimits) -> Sent:
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a list of at least one message", "messages")
    turns, room = [], limits.max_text
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise bad(f"the role of a message must be one of {', '.join(ROLES)}", f"{where}.role")
        role = "system" if message["role"] == "developer" else message["role"]
        drawn = role == "assistant" and limits.reads  # images that the model drew are flow tokens
        default = "flow" if drawn else limits.images
        said = [
            _part(part, limits, default, f"{where}.content[{k}]") for k, part in enumerate(_content(message, where))
        ]
        for text in texts(said):
            limits.check_text(text, room, where)
            room -= len(text)
        turns.append((role, said))
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


def _part(part: object, limits: RequestLimits, via: str, where: str) -> Text | Upload:
    """A part of a message. `via`: how the model sees an image that does not say it. `where`: the part's place."""
    fields: dict = part if isinstance(part, dict) else {}
    kind, text, image = fields.get("type"), fields.get("text"), fields.get("image_url")
    if kind == "text" and isinstance(text, str):
        return Text(text)
    if kind != "image_url" or not isinstance(image, dict):
        raise bad('a part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}', where)
    if not limits.reads and not limits.vision:
        raise bad(f"{LATENTS}, and it has no vision tower to see yours; send text alone", where)
    via = image.get("via", via)
    if via == "flow" and not limits.reads:
        raise bad(f"{LATENTS}; leave via out, so that its vision tower reads yours", f"{where}.image_url.via")
    if via not in ("flow", "vit") or (via == "vit" and not limits.vision):
        raise bad('via must be "flow", or "vit" if the model has a vision tower', f"{where}.image_url.via")
    return upload(image.get("url"), via, limits, where)
