"""A codec for image files that hold latents of another encoder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from starflow2_jax.codecs.fae import FaeCodec, read_fae
from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import option


@dataclass(frozen=True)
class LatentOptions:
    """Image files hold arrays (h, w, D) of latents."""

    grid: tuple[int, int] = option("rows and columns of tokens", least=1)
    channels: int = option("channels of a token", least=1)
    shift: float = option("number that is subtracted from the latents in the files", 0.0)
    scale: float = option("number that the shifted latents are divided by", 1.0, above=0)
    decoder: str = option("folder of an FAE codec that makes pictures of the arrays; empty: none, arrays come out", "")

    image_channels: ClassVar[int] = 3  # of pictures, which only the vision tower sees

    def image_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, D): an array of latents has the shape of its tokens."""
        return (*grid, self.channels)


@dataclass(frozen=True)
class LatentCodec(Codec):
    """Arrays (h, w, D) of latents in files, which it only shifts and scales: (array - shift) / scale.

    decoder: a codec whose latents the arrays are, so that `decode` gives pictures; None: it gives arrays.
    """

    grid: tuple[int, int]
    channels: int
    shift: float = 0.0
    scale: float = 1.0
    decoder: FaeCodec | None = None

    kind = "latents"
    Options = LatentOptions
    is_pixels = False
    image_channels = LatentOptions.image_channels

    @classmethod
    def make(cls, options: LatentOptions, images: Iterable[np.ndarray]) -> "LatentCodec":
        """The codec that the options describe. It reads no image. Raises ConfigError if the decoder does not fit."""
        h, w = options.grid
        decoder = read_fae(Path(options.decoder)).for_grid((h, w)) if options.decoder else None
        if decoder and decoder.channels != options.channels:
            raise ConfigError(
                f"codec.channels is {options.channels}, but the codec in {options.decoder} has {decoder.channels}; set "
                f"it to that, or name another codec.decoder"
            )
        return cls((h, w), options.channels, options.shift, options.scale, decoder)

    @classmethod
    def restored(cls, description: dict[str, Any], weights: Mapping[str, Any]) -> "LatentCodec":
        """See Codec."""
        decoder = description.pop("decoder", None)
        return cls(**description, decoder=FaeCodec.restored(decoder, weights) if decoder else None)

    def description(self) -> dict[str, Any]:
        """See Codec."""
        values = {name: getattr(self, name) for name in ("grid", "channels", "shift", "scale")}
        return values | ({"decoder": self.decoder.description()} if self.decoder else {})

    @property
    def weights(self) -> Mapping[str, Any]:
        """Those of the decoder."""
        return self.decoder.weights if self.decoder else {}

    @property
    def makes_pixels(self) -> bool:
        """Whether there is a decoder."""
        return self.decoder is not None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, D)."""
        return (*self.grid, self.channels)

    @property
    def mean(self) -> tuple[float, ...]:
        """(D,): `shift` for each channel."""
        return (self.shift,) * self.channels

    @property
    def std(self) -> tuple[float, ...]:
        """(D,): `scale` for each channel."""
        return (self.scale,) * self.channels

    def encode(self, images: Any) -> Any:
        """Arrays (B, h, w, D) of files -> latents of the same shape. Raises ValueError for another shape."""
        require_shape(images, self.image_shape, "latents")
        return (images - self.shift) / self.scale

    def decode(self, latents: Any) -> Any:
        """Latents (B, h, w, D) -> arrays of the same shape, as in the files; with a decoder, pictures (B, height,
        width, 3).
        """
        arrays = latents * self.scale + self.shift
        return self.decoder.decode(arrays) if self.decoder else arrays

    @property
    def log_volume(self) -> float:
        """Log-determinant of `encode` per dimension: -log(scale)."""
        return -float(np.log(self.scale))
