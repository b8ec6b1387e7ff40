"""What a request may contain: the model's sizes, and the server's limits."""

import re
from dataclasses import dataclass

from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import special_tokens
from starflow2_jax.serving.errors import ApiError, bad


@dataclass(frozen=True)
class RequestLimits:
    """The sizes of the model, and the limits of the server."""

    channels: int
    size: tuple[int, int] | None  # (height, width) of a flow image; None if flow images are latents
    tokens: int  # of a flow image
    vision: VisionConfig | None
    positions: int  # of a row
    max_text: int  # characters in all texts of a request
    special: re.Pattern  # tokens that no text may hold
    max_pixels: int
    max_choices: int
    images: str = "flow"  # how the model sees images that set no `via`
    editing: bool = False  # whether requests may use `image_guidance`

    @classmethod
    def of(cls, sampler: Sampler, **limits) -> "RequestLimits":
        """The limits for a sampler. `limits`: the fields from max_pixels on."""
        tokenizer, codec, cfg = sampler.tokenizer, sampler.codec, sampler.model.cfg
        size = codec.image_shape[:2] if codec.is_pixels else None
        if size is None:
            limits["images"] = "vit"
        max_text = sampler.max_positions * max(map(len, tokenizer.get_vocab()))  # a longer text cannot fit in a row
        return cls(
            codec.image_channels, size, cfg.tokens, cfg.vlm.vision, sampler.max_positions, max_text,
            special_tokens(tokenizer), **limits,
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        return self.size is not None

    def check_text(self, text: str, most: int, param: str) -> None:
        """Refuse a text before it is tokenized, because that takes time for a long text. Raises ApiError."""
        if len(text) > most:
            raise ApiError(
                400, f"the texts of a request may have at most {self.max_text} characters, which is more than a row can hold; shorten the prompt",
                "context_length_exceeded", param,
            )  # fmt: skip
        if found := self.special.search(text):
            raise bad(
                f"a text may not hold {found.group()!r}, which is a special token of the model; leave it out", param
            )
