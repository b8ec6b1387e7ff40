"""What the vision tower is given: an image resized, normalised and cut into patches, as Qwen2-VL's processor does it."""

import math

import numpy as np
from PIL import Image as Pillow

from starflow2_jax.models.qwen_vision import VisionConfig


def resized(cfg: VisionConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Image size in pixels -> the size that the tower sees (Qwen2-VL's rule).

    Sides become multiples of patch x merge, the area comes within min_pixels and max_pixels, the aspect about stays.
    Raises ValueError for images more than 200 times as long as wide.
    """
    side, area = cfg.patch * cfg.merge, math.prod(size)
    if max(size) > 200 * min(size):
        raise ValueError(
            f"an image of {size[0]}x{size[1]} pixels was given; the vision tower takes none that is over 200 times as long "
            "as wide"
        )
    height, width = (round(s / side) * side for s in size)
    if height * width > cfg.max_pixels:
        shrink = math.sqrt(area / cfg.max_pixels)
        height, width = (max(side, math.floor(s / shrink / side) * side) for s in size)
    elif height * width < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / area)
        height, width = (math.ceil(s * grow / side) * side for s in size)
    return height, width


def merged_grid(cfg: VisionConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Image size in pixels, before resizing -> grid of merged tokens. Raises ValueError as `resized` does."""
    height, width = resized(cfg, size)
    return height // (cfg.patch * cfg.merge), width // (cfg.patch * cfg.merge)


def preprocess(cfg: VisionConfig, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels (height, width, C) in [-1, 1] -> patches (P, patch width), coordinates (P, 2), window (P,) from 0.

    Gray images are repeated to the tower's channels. An image is resized, where it has to be, as 8-bit levels with a
    bicubic filter. Patches come merge group by merge group, in raster order.
    """
    height, width = resized(cfg, pixels.shape[:2])
    h, w = height // (cfg.patch * cfg.merge), width // (cfg.patch * cfg.merge)
    if pixels.shape[:2] != (height, width):
        levels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
        planes = [Pillow.fromarray(levels[..., i]) for i in range(levels.shape[-1])]
        planes = [plane.resize((width, height), Pillow.Resampling.BICUBIC) for plane in planes]
        pixels = np.stack([np.asarray(plane, np.float32) for plane in planes], axis=-1) / 127.5 - 1
    pixels = np.broadcast_to((pixels + 1) / 2, (height, width, cfg.channels))
    x = (pixels - np.asarray(cfg.mean)) / np.asarray(cfg.std)
    m, p = cfg.merge, cfg.patch
    x = x.reshape(h, m, p, w, m, p, cfg.channels).transpose(0, 3, 1, 4, 6, 2, 5)  # h w m m C p p
    x = np.repeat(x[:, :, :, :, :, None], cfg.temporal_patch, axis=5)
    rows, columns = np.meshgrid(np.arange(h * m), np.arange(w * m), indexing="ij")
    coordinates = np.stack([rows, columns], -1).reshape(h, m, w, m, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    side = max(cfg.window // (p * m), 1) * m  # of a window, in patches
    window = coordinates[:, 0] // side * (-(-w * m // side)) + coordinates[:, 1] // side
    return {
        "patches": x.reshape(-1, cfg.patch_width).astype(np.float32),
        "coordinates": coordinates.astype(np.int32),
        "window": window.astype(np.int32),
    }
