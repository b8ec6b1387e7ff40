"""The limits of a request, which follow from the sizes of the model and the options of the server."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import special_tokens
from starflow2_jax.serving.errors import ApiError, bad
from starflow2_jax.serving.prompts import Turns, prompt


@dataclass(frozen=True)
class RequestLimits:
    """What a request may contain."""

    channels: int
    size: tuple[int, int] | None  # (height, width) of a flow image; None if it reads latents
    draws: bool  # whether the images that it makes are pictures
    latents: tuple[int, int, int]  # (h, w, D) of a flow image
    vision: VisionConfig | None
    positions: int  # of a row
    length: Callable[
        [Turns, Mapping[str, Any]], int
    ]  # positions of a conversation, with variables of the chat template
    max_text: int  # characters in all texts of a request
    special: re.Pattern  # finds special tokens, which no text may hold
    max_pixels: int  # in all images of a request
    max_choices: int  # answers to one request
    images: str = "flow"  # how the model sees images that set no `via`
    editing: bool = False  # whether requests may use `image_guidance`
    max_images: int | None = None  # most images of an answer; None: any number

    @classmethod
    def of(cls, sampler: Sampler, **limits: Any) -> "RequestLimits":
        """The limits for a sampler's model. `limits`: values of the fields from `max_pixels` on."""
        tokenizer, codec, vision = sampler.tokenizer, sampler.codec, sampler.encoder.vision
        size = codec.image_shape[:2] if codec.is_pixels else None
        if size is None:
            limits["images"] = "vit"  # clients send pictures, which this model can only see through its vision tower
        max_text = sampler.max_positions * max(map(len, tokenizer.get_vocab()))  # a longer text cannot fit in a row

        def length(turns: Turns, variables: Mapping[str, Any]) -> int:
            return len(sampler.encoder(prompt(sampler, turns, variables), closed=False)["tokens"])

        return cls(
            codec.image_channels,
            size,
            codec.makes_pixels,
            (*codec.grid, codec.channels),
            vision,
            sampler.max_positions,
            length,
            max_text,
            special_tokens(tokenizer),
            **limits,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a flow image."""
        return self.latents[0] * self.latents[1]

    @property
    def reads(self) -> bool:
        """Whether pictures of clients can be flow images, such as those that the model makes."""
        return self.size is not None

    @property
    def drawing(self) -> bool:
        """Whether answers may have pictures."""
        return self.draws and self.max_images != 0

    def images_of(self, asked: int | None) -> int | None:
        """Most images of an answer to a request that allows `asked` (None: any number)."""
        if not self.draws:
            return 0
        bounds = [n for n in (asked, self.max_images) if n is not None]
        return min(bounds, default=None)

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
