"""What a codec is: a frozen map between images and the latent tokens that the flow models."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, Self

import numpy as np


class Options(Protocol):
    """The keys of a config's `codec` section beside `kind`: a frozen dataclass with a default for each."""

    image_channels: int  # of an image file when it is read: 1 (gray) or 3 (RGB)

    def image_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Shape of the images whose latents have this grid."""


class Codec(Protocol):
    """Images (B, *image_shape) <-> latents (B, h, w, D) with mean 0 and deviation 1 in each channel.

    A latent's nats per dimension, less `log_volume`, are the image's. Where that is None only latents have a density.
    `encode` and `decode` take NumPy and JAX arrays, and are compiled where the codec has weights. A codec that inherits
    from this class and is a frozen dataclass of JSON values needs no `weights`, `description` and `restored` of its own.
    """

    kind: ClassVar[str]  # its name in the table
    Options: ClassVar[type]
    is_pixels: ClassVar[bool]  # images are pictures in [-1, 1], to be shown and written as PNG; else arrays, as .npy

    image_shape: tuple[int, int, int]  # (height, width, C) of what `encode` takes
    image_channels: int  # of an image file when it is read: 1 (gray) or 3 (RGB)
    grid: tuple[int, int]  # (h, w) of the latents
    channels: int  # D
    mean: tuple[float, ...]  # (D,): what `encode` subtracts from each channel
    std: tuple[
        float, ...
    ]  # (D,): by which `encode` then divides; training noise, in the images' units, is divided by it
    log_volume: float | None  # log-determinant of `encode` per dimension; None where it is no bijection
    weights: Mapping[str, Any] = {}  # nested dicts of arrays, saved beside the description with their content hash

    @classmethod
    def make(cls, options: Any, images: Iterable[np.ndarray]) -> Self:
        """A new codec. `images`: the source's, read only if they are asked for. Raises ConfigError."""
        ...

    def encode(self, images):
        """(B, *image_shape) -> (B, h, w, D). Raises ValueError for another shape."""
        ...

    def decode(self, latents):
        """(B, h, w, D) -> (B, *image_shape), pictures not clipped."""
        ...

    def description(self) -> dict[str, Any]:
        """JSON values from which, with the weights, `restored` makes this codec again."""
        return asdict(self)

    @classmethod
    def restored(cls, description: dict[str, Any], weights: Mapping[str, Any]) -> Self:
        """The codec that was saved. `description`: with tuples where JSON has lists."""
        return cls(**description)


def require_shape(images, wanted: tuple[int, int, int], what: str) -> None:
    """Raises ValueError where images (B, ...) are not of the shape (B, *wanted). `what`: "pixels" or "latents"."""
    if tuple(images.shape[1:]) != wanted:
        given, takes = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        advice = "; resize it" if what == "pixels" else ""
        raise ValueError(f"an image of {given} was given, but the codec takes {takes} {what}{advice}")
