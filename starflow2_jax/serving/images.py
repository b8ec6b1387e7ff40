"""Images in requests and answers: data URLs <-> arrays of pixels."""

import base64
import binascii
import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from starflow2_jax.data.documents import DocumentError, LengthError
from starflow2_jax.data.images import as_pillow, from_pillow
from starflow2_jax.data.pictures import Picture
from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.fitting import Size, shared
from starflow2_jax.serving.errors import ApiError, bad
from starflow2_jax.serving.request_limits import RequestLimits

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]  # found by a file's first bytes, whatever type its label names


class Budget:
    """The pixels and positions that are left for the images of a request.

    Images are decoded one after another, and each is scaled to what the model sees of it at once. So an image needs
    room for its own pixels as its file is decoded, known from the header, beside those of the images before it as they
    are kept.
    """

    def __init__(self, limits: RequestLimits):
        self.limits, self.pixels, self.positions = limits, limits.max_pixels, limits.positions

    def take(self, size: Size, via: str, param: str, shown: Size | None = None) -> None:
        """Count one image. Raises ApiError if not enough is left.

        `size`: (width, height) as it is decoded, in pixels. `via`: "flow", or "vit" for a model with a vision tower.
        `param`: the image's place in the request, for messages. `shown`: (height, width) to which an image "vit" is
        scaled; None: as the tower does it.
        """
        kept, positions, vision = self.limits.size, self.limits.tokens, self.limits.vision
        if via == "vit" and vision:
            kept = shown or resized(vision, (size[1], size[0]), param)
            positions = math.prod(vision.merged_grid(kept))
        self.positions -= positions + 2  # with the tokens that open and close an image
        if not self.holds(size) or not self.holds(kept or ()):
            raise self.refusal(param)
        self.pixels -= math.prod(kept or ())
        if self.positions < 0:
            most = self.limits.positions
            message = f"the images of a request take more than the {most} positions of a row; send fewer images"
            raise ApiError(400, message, "context_length_exceeded", param)

    def holds(self, size: tuple[int, ...]) -> bool:
        """Whether an image of this size may be decoded now."""
        return math.prod(size) <= self.pixels

    def refusal(self, param: str) -> ApiError:
        """The error for too many pixels."""
        message = f"the images of a request may have {self.limits.max_pixels} pixels together; send smaller ones"
        return ApiError(413, message, "too_large", param)


@dataclass(frozen=True, eq=False)
class Upload:
    """An image of a request. Its header has been read, its pixels have not. `param`: its place in the request."""

    picture: Picture
    via: str  # "flow" or "vit"
    param: str

    def decode(self, budget: Budget, shown: Size | None = None) -> np.ndarray:
        """The pixels as the model sees them, (height, width, C) fp32 in [-1, 1]. Raises ApiError.

        An image "flow" is scaled to the model's size, and cropped around its centre if the proportions differ. An image
        "vit" is scaled to `shown` (height, width); None: as the tower does it. A JPEG file that is too large to decode
        whole is decoded at a lower resolution, but never below that of the result.
        """
        limits, size = budget.limits, self.picture.size
        with _readable(budget, self.param):
            if self.via == "vit" and limits.vision:
                target = shown or resized(limits.vision, (size[1], size[0]), self.param)
            else:
                target = limits.size
            side = None
            if target and not budget.holds(size):
                side, size = max(target), self.picture.drafted(max(target))
            budget.take(size, self.via, self.param, target if self.via == "vit" else None)
            image = self.picture.opaque(limits.channels, side)
            if self.via == "vit":
                return from_pillow(_scaled(image, target, self.picture.size))
            if target and image.size != (wanted := (target[1], target[0])):
                image = ImageOps.fit(image, wanted, Pillow.Resampling.LANCZOS)
            return from_pillow(image)


@contextlib.contextmanager
def _readable(budget: Budget, param: str) -> Iterator[None]:
    """Raises ApiError in place of the errors of a file that cannot be read."""
    try:
        yield
    except Pillow.DecompressionBombError:  # Pillow's own limit, which it also reads from the header
        raise budget.refusal(param) from None
    except (OSError, SyntaxError, ValueError):
        raise bad("the image cannot be read; send a whole PNG, JPEG, WEBP, GIF or BMP file", param) from None


def _scaled(image: Pillow.Image, target: Size | None, stored: Size) -> Pillow.Image:
    """The picture at `target` (height, width), which was computed from the file's `stored` (width, height)."""
    if target is None:
        return image
    turned = (image.width > image.height) != (stored[0] > stored[1]) and image.width != image.height
    width, height = target if turned else target[::-1]
    return image if image.size == (width, height) else image.resize((width, height), Pillow.Resampling.BICUBIC)


def resized(vision: VisionConfig, size: Size, param: str) -> Size:
    """`VisionConfig.resized`, with its ValueError as an ApiError. `size`: (height, width) in pixels."""
    try:
        return vision.resized(size)
    except ValueError as error:
        raise bad(str(error), param) from None


def fitted(vision: VisionConfig, asked: VisionConfig, uploads: list[Upload], room: int, row: int) -> list[Size]:
    """`fitting.shared` for uploads, with its errors as ApiErrors."""
    files: list[Size] = [(upload.picture.size[1], upload.picture.size[0]) for upload in uploads]
    try:
        return shared(vision, asked, files, room, row)
    except DocumentError as error:
        code = "context_length_exceeded" if isinstance(error, LengthError) else "invalid_value"
        raise bad(str(error), uploads[error.index or 0].param, code) from None


def upload(url: object, via: str, limits: RequestLimits, param: str) -> Upload:
    """The image in a data: URL, with its header read. Raises ApiError. `param`: its place in the request, for
    messages.
    """
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise bad('an image must be a data URL, "data:image/png;base64,..."; this server fetches no addresses', param)
    head, _, body = url[5:].partition(",")
    kind, *rest = (word.strip() for word in head.lower().split(";"))
    if not kind.startswith("image/") or "base64" not in rest:
        raise bad(f"an image must be a base64 data URL, data:image/png;base64,..., not {head[:60]!r}", param)
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad("the image's data is not valid base64", param) from None
    with _readable(Budget(limits), param):
        return Upload(Picture(io.BytesIO(data), formats=FORMATS), via, param)


def to_url(pixels: np.ndarray) -> str:
    """Pixels (height, width, C) in [-1, 1], C 1 or 3, as a data: URL of a PNG file."""
    file = io.BytesIO()
    as_pillow(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
