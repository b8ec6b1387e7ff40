"""What a server takes of a request."""

import re
from dataclasses import dataclass

from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import special_tokens
from starflow2_jax.serving.errors import ApiError, bad


@dataclass(frozen=True)
class RequestLimits:
    """What the model takes, and how much of it."""

    channels: int
    size: tuple[int, int] | None  # (height, width) of a flow image; None: it is latents, which nobody can look at
    tokens: int  # of a flow image
    vision: VisionConfig | None
    positions: int  # of a row
    max_text: int  # characters of a request's texts together
    special: re.Pattern  # tokens that no text may hold
    max_pixels: int
    max_choices: int
    images: str = "flow"  # how an image is seen whose `via` is not given
    editing: bool = False  # whether there is `image_guidance`

    @classmethod
    def of(cls, sampler: Sampler, **limits) -> "RequestLimits":
        """What this sampler takes; `limits`: the fields from max_pixels on."""
        tokenizer, codec, cfg = sampler.tokenizer, sampler.codec, sampler.model.cfg
        size = codec.image_shape[:2] if codec.is_pixels else None
        if size is None:
            limits["images"] = "vit"
        max_text = sampler.max_positions * max(map(len, tokenizer.get_vocab()))  # what has more cannot fit a row
        return cls(
            codec.image_channels, size, cfg.tokens, cfg.vlm.vision, sampler.max_positions, max_text,
            special_tokens(tokenizer), **limits,
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        return self.size is not None

    def check_text(self, text: str, most: int, param: str) -> None:
        """Before the tokenizer sees it, whose time grows with the text. Raises ApiError."""
        if len(text) > most:
            raise ApiError(
                400, f"a request's text may have {self.max_text} characters, more than a row could hold; shorten the prompt",
                "context_length_exceeded", param,
            )  # fmt: skip
        if found := self.special.search(text):
            raise bad(f"a text may not hold {found.group()!r}, which is a token of the model's own", param)
