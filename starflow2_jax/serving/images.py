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
    """The pixels and positions that are left for the images of a request.

    An image counts with the pixels that its file's header states, read before the file is decoded, or with those after
    resizing, if they are more.
    """

    def __init__(self, limits: RequestLimits):
        self.limits, self.pixels, self.positions = limits, limits.max_pixels, limits.positions

    def take(self, size: tuple[int, int], via: str, param: str) -> None:
        """Count one image. Raises ApiError if not enough is left.

        `size`: (width, height) of the file in pixels. `via`: "flow", or "vit" for a model with a vision tower. `param`:
        the image's place in the request, for messages.
        """
        shown, positions, vision = self.limits.size, self.limits.tokens, self.limits.vision
        if via == "vit" and vision:
            width, height = size
            try:
                shown = vision.resized((height, width))
                positions = math.prod(vision.merged_grid((height, width)))
            except ValueError as error:
                raise bad(str(error), param) from None
        self.pixels -= max(math.prod(size), math.prod(shown or ()))
        self.positions -= positions + 2  # with the tokens that open and close an image
        if self.pixels < 0:
            raise self.refusal(param)
        if self.positions < 0:
            message = f"the images of a request take more than the {self.limits.positions} positions of a row; send fewer images"
            raise ApiError(400, message, "context_length_exceeded", param)

    def refusal(self, param: str) -> ApiError:
        """The error for too many pixels."""
        message = f"the images of a request may have {self.limits.max_pixels} pixels together; send smaller ones"
        return ApiError(413, message, "too_large", param)


def from_url(url: object, via: str, budget: Budget, param: str) -> np.ndarray:
    """The pixels of a data: URL that holds a PNG or JPEG file: (height, width, channels) fp32 in [-1, 1]. Raises ApiError.

    An image via "flow" is scaled to the model's size, and cropped around its centre if the proportions differ. `budget`
    counts the image before it is decoded. `param`: the image's place in the request, for messages.
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
        if size is not None and image.size != (wanted := (size[1], size[0])):
            image = ImageOps.fit(image, wanted, Pillow.Resampling.LANCZOS)
        return from_pillow(image)
    except Pillow.DecompressionBombError:  # Pillow's own limit, which it also reads from the header
        raise budget.refusal(param) from None
    except (OSError, SyntaxError, ValueError):
        raise bad("the image cannot be read; send a whole PNG or JPEG file", param) from None


def to_url(pixels: np.ndarray) -> str:
    """Pixels (height, width, C) in [-1, 1], C 1 or 3, as a data: URL of a PNG file."""
    file = io.BytesIO()
    as_pillow(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
