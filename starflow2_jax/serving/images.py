"""Images in requests and answers: data URLs <-> arrays of pixels."""

import base64
import binascii
import io
import math

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from starflow2_jax.data.images import as_pillow, from_pillow
from starflow2_jax.data.pictures import Picture
from starflow2_jax.serving.errors import ApiError, bad
from starflow2_jax.serving.request_limits import RequestLimits

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG"}


class Budget:
    """Pixels and positions that the remaining images of a request may take.

    Pixels are counted from the file's header, before it is decoded, or after resizing, whichever is more.
    """

    def __init__(self, limits: RequestLimits):
        self.limits, self.pixels, self.positions = limits, limits.max_pixels, limits.positions

    def take(self, size: tuple[int, int], via: str, param: str) -> None:
        """size: (width, height) of the file. Raises ApiError."""
        if via == "flow":
            shown, positions = self.limits.size, self.limits.tokens
        else:
            try:
                shown = self.limits.vision.resized(size[::-1])
                positions = math.prod(self.limits.vision.merged_grid(size[::-1]))
            except ValueError as error:
                raise bad(str(error), param) from None
        self.pixels -= max(math.prod(size), math.prod(shown))
        self.positions -= positions + 2  # with the tokens that open and close an image
        if self.pixels < 0:
            raise self.refusal(param)
        if self.positions < 0:
            message = (
                f"the images of a request take more than the {self.limits.positions} positions of a row; send fewer"
            )
            raise ApiError(400, message, "context_length_exceeded", param)

    def refusal(self, param: str) -> ApiError:
        message = f"the images of a request may have {self.limits.max_pixels} pixels together; send smaller ones"
        return ApiError(413, message, "too_large", param)


def from_url(url: object, via: str, budget: Budget, param: str) -> np.ndarray:
    """A data: URL of a PNG or JPEG file -> (height, width, channels) fp32 in [-1, 1]. Raises ApiError.

    For `via` "flow" the image is scaled to the model's size, and cropped around its middle if the proportions differ.
    """
    channels, size = budget.limits.channels, budget.limits.size if via == "flow" else None
    if not isinstance(url, str) or not url.startswith("data:"):
        raise bad('an image must be a data URL, "data:image/png;base64,..."; this server fetches no addresses', param)
    head, _, body = url.removeprefix("data:").partition(",")
    kind, *rest = head.lower().split(";")
    if kind not in FORMATS or "base64" not in rest:
        raise bad(f"an image must be a base64 data URL of {' or '.join(FORMATS)}, not {head[:60]!r}", param)
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise bad("the image's data is not valid base64", param) from None
    try:
        picture = Picture(io.BytesIO(data), formats=list(FORMATS.values()))
        budget.take(picture.size, via, param)
        image = picture.opaque(channels)
        if size is not None and image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Pillow.Resampling.LANCZOS)
        return from_pillow(image)
    except Pillow.DecompressionBombError:  # Pillow's own limit, which it also reads from the header
        raise budget.refusal(param) from None
    except (OSError, SyntaxError, ValueError):
        raise bad("the image cannot be read; send a whole PNG or JPEG file", param) from None


def to_url(pixels: np.ndarray) -> str:
    """(height, width, C) in [-1, 1], C 1 or 3 -> a data: URL of a PNG file."""
    file = io.BytesIO()
    as_pillow(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
