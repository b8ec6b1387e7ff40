"""Limits of a request: the sizes of the model, and the options of the server."""

import re
from dataclasses import dataclass
from typing import Any

from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import special_tokens
from starflow2_jax.serving.errors import ApiError, bad


@dataclass(frozen=True)
class RequestLimits:
    """What a request may contain, by the sizes of the model and the options of the server."""

    channels: int
    size: tuple[int, int] | None  # (height, width) of a flow image; None if flow images are latents
    tokens: int  # of a flow image
    vision: VisionConfig | None
    positions: int  # of a row
    max_text: int  # characters in all texts of a request
    special: re.Pattern  # finds special tokens, which no text may hold
    max_pixels: int  # in all images of a request
    max_choices: int  # answers to one request
    images: str = "flow"  # how the model sees images that set no `via`
    editing: bool = False  # whether requests may use `image_guidance`

    @classmethod
    def of(cls, sampler: Sampler, **limits: Any) -> "RequestLimits":
        """The limits for a sampler's model. `limits`: values of the fields from `max_pixels` on."""
        tokenizer, codec, cfg = sampler.tokenizer, sampler.codec, sampler.model.cfg
        size = codec.image_shape[:2] if codec.is_pixels else None
        if size is None:
            limits["images"] = "vit"  # clients send pictures, which this model sees through its vision tower only
        max_text = sampler.max_positions * max(map(len, tokenizer.get_vocab()))  # a longer text cannot fit in a row
        special = special_tokens(tokenizer)
        sizes = (codec.image_channels, size, cfg.tokens, cfg.vlm.vision, sampler.max_positions)
        return cls(*sizes, max_text, special, **limits)

    @property
    def draws(self) -> bool:
        """Whether the model writes pictures."""
        return self.size is not None

    def check_text(self, text: str, most: int, param: str) -> None:
        """Raises ApiError for a text with more than `most` characters or with a special token.

        The text is not tokenized for this, because that takes long for a long text. `param`: its place in the request.
        """
        if len(text) > most:
            message = f"the texts of a request may have at most {self.max_text} characters together; shorten the prompt"
            raise ApiError(400, message, "context_length_exceeded", param)
        if found := self.special.search(text):
            raise bad(
                f"a text may not hold {found.group()!r}, which is a special token of the model; leave it out", param
            )
