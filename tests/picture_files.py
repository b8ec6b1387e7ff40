"""Picture files of tests."""

import io

import numpy as np
from PIL import Image as Pillow


def png(seed: int, size: tuple[int, int] = (6, 8)) -> bytes:
    """A PNG file of random colours; size: (height, width)."""
    file = io.BytesIO()
    Pillow.fromarray(levels(seed, size)).save(file, "PNG")
    return file.getvalue()


def levels(seed: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    """Its levels (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def pixels(seed: int, size: tuple[int, int] = (6, 8)) -> np.ndarray:
    """Its pixels (height, width, 3)."""
    return levels(seed, size).astype(np.float32) / 127.5 - 1
