"""Pictures on their way in and out: data URLs <-> arrays of pixels."""

import base64
import binascii
import io

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from starflow2_jax.data.documents import as_pillow
from starflow2_jax.serving.errors import ApiError, bad

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG"}


class Budget:
    """Pixels that a request may still bring. They are counted from the files' headers, before anything is decoded."""

    def __init__(self, pixels: int):
        self.most = self.left = pixels

    def take(self, size: tuple[int, int], param: str) -> None:
        self.left -= size[0] * size[1]
        if self.left < 0:
            raise self.refusal(param)

    def refusal(self, param: str) -> ApiError:
        message = f"the images of a request may have {self.most} pixels together; send smaller ones"
        return ApiError(413, message, "too_large", param)


def from_url(url: object, channels: int, size: tuple[int, int] | None, budget: Budget, param: str) -> np.ndarray:
    """A data: URL of a PNG or JPEG file -> (height, width, channels) fp32 in [-1, 1]. Raises ApiError.

    `size`: (height, width) that it is scaled to, its middle being kept where the proportions differ; None: as it is.
    """
    if not isinstance(url, str) or not url.startswith("data:"):
        raise bad('an image is given as "data:image/png;base64,..."; this server fetches no addresses', param)
    head, _, body = url.removeprefix("data:").partition(",")
    kind, *rest = head.lower().split(";")
    if kind not in FORMATS or "base64" not in rest:
        raise bad(f"an image is a base64 data URL of {' or '.join(FORMATS)}, not {head[:60]!r}", param)
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise bad("the image's data is not base64", param) from None
    try:
        with Pillow.open(io.BytesIO(data), formats=list(FORMATS.values())) as image:
            budget.take(image.size, param)
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            if size is not None and image.size != size[::-1]:
                image = ImageOps.fit(image, size[::-1], Pillow.Resampling.LANCZOS)
            pixels = np.asarray(image, np.float32)
    except Pillow.DecompressionBombError:  # Pillow's own limit, from the header, too
        raise budget.refusal(param) from None
    except (OSError, SyntaxError, ValueError):
        raise bad("the image cannot be read; send a whole PNG or JPEG file", param) from None
    return pixels.reshape(*pixels.shape[:2], channels) / 127.5 - 1


def to_url(pixels: np.ndarray) -> str:
    """(height, width, C) in [-1, 1], C 1 or 3 -> a data: URL of a PNG file."""
    file = io.BytesIO()
    as_pillow(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
