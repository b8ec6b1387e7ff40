"""A codec for data that are already latents, computed by some other encoder."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.fields import option


@dataclass(frozen=True)
class LatentOptions:
    """Image files hold latents."""

    grid: tuple[int, int] = option("rows and columns of tokens", least=1)
    channels: int = option("channels of a token", least=1)
    shift: float = option("number that is subtracted from the latents in the files", 0.0)
    scale: float = option("number that the shifted latents are divided by", 1.0, above=0)

    image_channels: ClassVar[int] = 3  # of image files, which only the vision tower sees

    def image_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        return (*grid, self.channels)


@dataclass(frozen=True)
class LatentCodec(Codec):
    """Arrays (h, w, D), from which `shift` is subtracted and which are then divided by `scale`."""

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
        h, w = options.grid
        return cls((h, w), options.channels, options.shift, options.scale)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (*self.grid, self.channels)

    @property
    def mean(self) -> tuple[float, ...]:
        return (self.shift,) * self.channels

    @property
    def std(self) -> tuple[float, ...]:
        return (self.scale,) * self.channels

    def encode(self, images: Any) -> Any:
        require_shape(images, self.image_shape, "latents")
        return (images - self.shift) / self.scale

    def decode(self, latents: Any) -> Any:
        return latents * self.scale + self.shift

    @property
    def log_volume(self) -> float:
        return -float(np.log(self.scale))
