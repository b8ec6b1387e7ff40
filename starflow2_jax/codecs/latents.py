"""Images that come as latents already, of whatever encoder."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.fields import option


@dataclass(frozen=True)
class LatentOptions:
    """Images come from files as latents."""

    grid: tuple[int, int] = option("rows and columns of tokens", least=1)
    channels: int = option("channels of a token", least=1)
    shift: float = option("what is subtracted from the latents in the files", 0.0)
    scale: float = option("what they are divided by after that", 1.0, above=0)

    image_channels: ClassVar[int] = 3  # of a picture, which only the vision tower sees

    def image_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        return (*grid, self.channels)


@dataclass(frozen=True)
class LatentCodec(Codec):
    """Arrays (h, w, D), shifted and scaled by two numbers."""

    grid: tuple[int, int]
    channels: int
    shift: float = 0.0
    scale: float = 1.0

    kind = "latents"
    Options = LatentOptions
    is_pixels = False
    image_channels = LatentOptions.image_channels

    @classmethod
    def make(cls, options: LatentOptions, images: Iterable[np.ndarray]) -> "LatentCodec":
        return cls(tuple(options.grid), options.channels, options.shift, options.scale)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*self.grid, self.channels)

    @property
    def mean(self) -> tuple[float, ...]:
        return (self.shift,) * self.channels

    @property
    def std(self) -> tuple[float, ...]:
        return (self.scale,) * self.channels

    def encode(self, images):
        require_shape(images, self.image_shape, "latents")
        return (images - self.shift) / self.scale

    def decode(self, latents):
        return latents * self.scale + self.shift

    @property
    def log_volume(self) -> float:
        return -float(np.log(self.scale))
