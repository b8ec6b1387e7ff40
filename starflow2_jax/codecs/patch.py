"""Codecs: frozen maps between images and the latent tokens the flow models."""

from dataclasses import dataclass

import numpy as np

LEAST_STD = 1e-2  # of a patch's channel, about one level of an 8-bit pixel


def patchify(images, patch: int):
    """Images (B, h p, w p, C) -> (B, h, w, D = C p p), channels ordered (channel, row, column)."""
    B, height, width, C = images.shape
    x = images.reshape(B, height // patch, patch, width // patch, patch, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, height // patch, width // patch, C * patch * patch)


def unpatchify(latents, patch: int, channels: int):
    """The inverse of `patchify`."""
    B, h, w, _ = latents.shape
    x = latents.reshape(B, h, w, channels, patch, patch)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, h * patch, w * patch, channels)


@dataclass(frozen=True)
class PatchCodec:
    """Lossless patches, each latent channel shifted and scaled to mean 0 and deviation 1 over the training images.

    Images are float arrays in [-1, 1]. Works on NumPy and JAX arrays alike.
    """

    image_size: tuple[int, int]
    image_channels: int
    patch: int
    mean: tuple[float, ...]  # (D,)
    std: tuple[float, ...]  # (D,)

    kind = "patch"

    @classmethod
    def fit(cls, images: np.ndarray, patch: int) -> "PatchCodec":
        """images (n, height, width, C): the training images. A channel that hardly varies is scaled by 1/LEAST_STD."""
        latents = patchify(images, patch).reshape(-1, images.shape[-1] * patch * patch)
        mean, std = latents.mean(0), np.maximum(latents.std(0), LEAST_STD)
        return cls(images.shape[1:3], images.shape[-1], patch, tuple(mean.tolist()), tuple(std.tolist()))

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def channels(self) -> int:
        return len(self.mean)

    def encode(self, images):
        """(B, height, width, C) -> (B, h, w, D). Raises ValueError for another image size."""
        if tuple(images.shape[1:]) != (*self.image_size, self.image_channels):
            want = "x".join(map(str, (*self.image_size, self.image_channels)))
            raise ValueError(
                f"an image of size {'x'.join(map(str, images.shape[1:]))} was given, but the codec takes {want}; resize it"
            )
        return (patchify(images, self.patch) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def decode(self, latents):
        """(B, h, w, D) -> (B, height, width, C), not clipped."""
        latents = latents * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return unpatchify(latents, self.patch, self.image_channels)

    @property
    def log_volume(self) -> float:
        """Log-determinant of `encode`, per dimension: subtract it from a latent's nats per dimension to get the image's."""
        return -float(np.mean(np.log(self.std)))


@dataclass(frozen=True)
class LatentCodec:
    """Images that come as latents already, of whatever encoder: arrays (h, w, D), shifted and scaled by two numbers."""

    grid: tuple[int, int]
    channels: int
    shift: float = 0.0
    scale: float = 1.0

    kind = "latents"
    image_channels = 3  # of a picture that only the vision tower sees

    @property
    def std(self) -> tuple[float, ...]:
        return (self.scale,) * self.channels

    def encode(self, images):
        """(B, h, w, D) -> (B, h, w, D). Raises ValueError for another shape."""
        if tuple(images.shape[1:]) != (*self.grid, self.channels):
            given, want = ("x".join(map(str, shape)) for shape in (images.shape[1:], (*self.grid, self.channels)))
            raise ValueError(f"an image of shape {given} was given, but the codec takes latents of {want}")
        return (images - self.shift) / self.scale

    def decode(self, latents):
        """(B, h, w, D) -> (B, h, w, D)."""
        return latents * self.scale + self.shift

    @property
    def log_volume(self) -> float:
        """Log-determinant of `encode`, per dimension."""
        return -float(np.log(self.scale))


Codec = PatchCodec | LatentCodec
CODECS = {codec.kind: codec for codec in (PatchCodec, LatentCodec)}
