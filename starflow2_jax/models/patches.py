"""Images <-> grids of patches, for NumPy and JAX arrays alike."""

from typing import Any


def patchify(images: Any, patch: int) -> Any:
    """Images (B, h p, w p, C) -> (B, h, w, D = C p p), channels ordered (channel, row, column)."""
    B, height, width, C = images.shape
    x = images.reshape(B, height // patch, patch, width // patch, patch, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, height // patch, width // patch, C * patch * patch)


def unpatchify(latents: Any, patch: int, channels: int) -> Any:
    """The inverse of `patchify`."""
    B, h, w, _ = latents.shape
    x = latents.reshape(B, h, w, channels, patch, patch)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, h * patch, w * patch, channels)
