"""The protocol of a codec: a frozen map between images and the latent tokens that the flow models."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, Self

import numpy as np

PIXEL_BITS = 7.0  # log2 of 128: one of 256 levels in [-1, 1] has the width 1/128


class Options(Protocol):
    """The keys of a config's `codec` section, apart from `kind`: a frozen dataclass with a default for each field."""

    image_channels: int  # pictures are read with these channels: 1 (gray) or 3 (RGB)

    def image_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """(height, width, C) of the images whose latents have this grid (h, w)."""
        ...


class Codec(Protocol):
    """Images (B, *image_shape) <-> latents (B, h, w, D) with mean 0 and standard deviation 1 in each channel.

    The negative log-likelihood of an image, in nats per dimension, is that of its latents minus `log_volume`. If
    `log_volume` is None, only latents have a density. `encode` and `decode` take NumPy and JAX arrays; a codec with
    weights compiles them.

    A codec that inherits from this class and is a frozen dataclass of JSON values can leave out `weights`,
    `description` and `restored`.
    """

    kind: ClassVar[str]  # the codec's name in the table
    Options: ClassVar[type]  # a class as the protocol above
    is_pixels: ClassVar[bool]  # whether `encode` takes pixels in [-1, 1]; otherwise other arrays, of .npy files

    image_shape: tuple[int, int, int]  # (height, width, C) of the images that `encode` takes
    image_channels: int  # pictures are read with these channels: 1 (gray) or 3 (RGB)
    grid: tuple[int, int]  # (h, w) of the latents
    channels: int  # D
    mean: tuple[float, ...]  # (D,): `encode` subtracts it from each channel
    std: tuple[float, ...]  # (D,): `encode` then divides by it, as training divides `config.noise`
    log_volume: float | None  # log-determinant of `encode` per dimension; None if `encode` is no bijection
    # True: training gives `encode_with` the pictures of a batch, on the devices; False: `encode` runs where documents
    # are read
    in_step: ClassVar[bool] = False
    weights: Mapping[str, Any] = {}  # nested dicts of arrays, which a checkpoint saves with their content hash

    @property
    def makes_pixels(self) -> bool:
        """Whether `decode` makes pixels in [-1, 1], written as PNG files; otherwise other arrays, written as .npy
        files.
        """
        return self.is_pixels

    @classmethod
    def make(cls, options: Any, images: Iterable[np.ndarray]) -> Self:
        """A new codec from an instance of `Options` and the source's images (height, width, C), which are read one by
        one while `make` iterates over them.

        Raises ConfigError if options and images do not fit each other.
        """
        ...

    def encode(self, images: Any) -> Any:
        """Images (B, *image_shape) -> latents (B, h, w, D). Raises ValueError for images of another shape."""
        ...

    def without_weights(self) -> Self:
        """What documents are laid out with: the same codec, which a codec with `in_step` makes light by leaving out its
        weights.
        """
        return self

    def encoder_weights(self) -> Mapping[str, Any]:
        """The part of `weights` that `encode_with` needs. Only for codecs with `in_step`."""
        return self.weights

    def encode_with(self, weights: Mapping[str, Any], images: Any) -> Any:
        """`encode` as a pure function of `encoder_weights`, which runs within a compiled step. Only with `in_step`."""
        raise TypeError(f"the codec {self.kind} is not encoded within a step")

    def decode(self, latents: Any) -> Any:
        """Latents (B, h, w, D) -> images, of `image_shape` if `encode` takes such. Pixels are not clipped to [-1,
        1].
        """
        ...

    def description(self) -> dict[str, Any]:
        """JSON values from which, together with the weights, `restored` makes this codec again."""
        codec: Any = self  # a dataclass
        return asdict(codec)

    @classmethod
    def restored(cls, description: dict[str, Any], weights: Mapping[str, Any]) -> Self:
        """The codec that was saved. In `description`, JSON's lists have become tuples."""
        return cls(**description)


def level_bits(codec: Codec) -> float:
    """-log2 of the width of one level of the data: added to a density's bits per dimension, it gives those of 8-bit
    pixels. 0 for data without such levels, and for a codec that is lossy."""
    return PIXEL_BITS if codec.is_pixels and codec.log_volume is not None else 0.0


def require_shape(images: Any, wanted: tuple[int, int, int], what: str) -> None:
    """Raises ValueError unless `images` has the shape (B, *wanted). what: for the message, "pixels" or "latents"."""
    if tuple(images.shape[1:]) != wanted:
        given, takes = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        advice = "; resize it" if what == "pixels" else ""
        raise ValueError(f"an image of {given} was given, but the codec takes {takes} {what}{advice}")
