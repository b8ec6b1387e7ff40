"""A lossless codec: each patch of pixels becomes one token, as it is or by its cosine transform."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.fft import dct

from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import option
from starflow2_jax.models.patches import patchify, unpatchify

BASES = ("pixels", "cosine")
LEAST_STD = 1e-2  # of a latent channel; about one level of an 8-bit pixel


@dataclass(frozen=True)
class PatchOptions:
    """Image files hold pixels; each square patch becomes one token."""

    patch: int = option("side of a patch, in pixels; each becomes one token", 2, least=1)
    image_channels: int = option("channels of an image: 1 gray, 3 red, green and blue", 3, least=1, most=3)
    basis: str = option(
        "channels of a token: the pixels of a patch, or their cosine transform", "pixels", choices=BASES
    )
    least_std: float = option(
        "least deviation that a channel is divided by; well above the noise of training, so that noise stays low",
        LEAST_STD,
        above=0,
    )

    @property
    def channels(self) -> int:
        """Numbers in one token (D)."""
        return self.image_channels * self.patch**2

    def image_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """(height, width, C) of the images with this grid (h, w) of patches."""
        return grid[0] * self.patch, grid[1] * self.patch, self.image_channels


@dataclass(frozen=True)
class PatchCodec(Codec):
    """Pixels in [-1, 1] -> patches, whose channels have mean 0 over the fitted images, and standard deviation 1, or
    less where `least_std` divided them.

    With the basis "cosine", a patch's channels are those of its orthonormal cosine transform: noise in pixels has the
    same deviation there, and a patch of one colour has only one channel for each colour that is not 0.
    """

    image_size: tuple[int, int]
    image_channels: int
    patch: int
    mean: tuple[float, ...]  # (D,)
    std: tuple[float, ...]  # (D,)
    basis: str = "pixels"  # one of BASES

    kind = "patch"
    Options = PatchOptions
    is_pixels = True

    @classmethod
    def make(cls, options: PatchOptions, images: Iterable[np.ndarray]) -> "PatchCodec":
        """A codec fitted to `images`, each (height, width, C) in [-1, 1].

        Raises ConfigError if there are none, if their sizes differ, or if the options do not fit them.
        """
        images = list(images)
        shapes = sorted({image.shape for image in images})
        if not shapes:
            raise ConfigError(
                'the source has no images via "flow" among the documents that the codec is fitted to; add some'
            )
        if len(sizes := sorted({shape[:2] for shape in shapes})) > 1:
            raise ConfigError(f"the source has flow images of the sizes {sizes}; bring them to one size")
        if sides := [side for side in sizes[0] if side % options.patch]:
            raise ConfigError(f"codec.patch={options.patch} does not divide an image's side of {sides[0]} pixels")
        if wrong := [shape[2] for shape in shapes if shape[2] != options.image_channels]:
            channels = f"{wrong[0]} channel{' (gray)' if wrong[0] == 1 else 's'}"
            raise ConfigError(f"the source's images have {channels}; set codec.image_channels to {wrong[0]}")
        return cls.fit(np.stack(images), options.patch, options.basis, options.least_std)

    @classmethod
    def fit(cls, images: np.ndarray, patch: int, basis: str = "pixels", least_std: float = LEAST_STD) -> "PatchCodec":
        """A codec fitted to `images` (n, height, width, C) in [-1, 1]. Channels whose standard deviation is below
        `least_std` are divided by it.
        """
        D = images.shape[-1] * patch * patch
        raw = cls(images.shape[1:3], images.shape[-1], patch, (0.0,) * D, (1.0,) * D, basis)
        latents = raw.encode(images).reshape(-1, D)
        mean, std = latents.mean(0), np.maximum(latents.std(0), least_std)
        return replace(raw, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, C) in pixels."""
        return (*self.image_size, self.image_channels)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def channels(self) -> int:
        """Numbers in one token (D)."""
        return len(self.mean)

    def encode(self, images: Any) -> Any:
        """Pixels (B, height, width, C) -> latents (B, h, w, D). Raises ValueError for another shape."""
        require_shape(images, self.image_shape, "pixels")
        latents = self._transformed(patchify(images, self.patch), self._matrix)
        return (latents - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def decode(self, latents: Any) -> Any:
        """Latents (B, h, w, D) -> pixels (B, height, width, C), which are not clipped."""
        latents = latents * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return unpatchify(self._transformed(latents, self._matrix.T), self.patch, self.image_channels)

    @property
    def _matrix(self) -> np.ndarray:
        """The orthonormal matrix (patch, patch) that transforms a column of a patch."""
        eye = np.eye(self.patch, dtype=np.float32)
        return np.asarray(dct(eye, axis=0, norm="ortho")) if self.basis == "cosine" else eye

    def _transformed(self, latents: Any, matrix: np.ndarray) -> Any:
        """Latents (B, h, w, D) with a matrix applied to the rows and the columns of every colour of each patch."""
        if self.basis == "pixels":
            return latents
        x = latents.reshape(*latents.shape[:3], self.image_channels, self.patch, self.patch) @ matrix.T
        return (x.swapaxes(-1, -2) @ matrix.T).swapaxes(-1, -2).reshape(latents.shape)

    @property
    def log_volume(self) -> float:
        """Log-determinant of `encode` per dimension: the mean of -log(std)."""
        return -float(np.mean(np.log(self.std)))
