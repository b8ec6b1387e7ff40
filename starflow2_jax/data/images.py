"""Stored images -> arrays, and arrays -> image files."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from etils import epath
from PIL import Image as Pillow
from PIL import ImageOps

from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data.documents import Image, ImageError, StoredImage
from starflow2_jax.data.pictures import Picture
from starflow2_jax.text_files import read_bytes, reason, shorten

BUCKETS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> the package that reads it, and our extra
CROPS = ("center", "random", "none")
LARGEST = 2**29  # bytes of a file on disk that holds an image


@dataclass(frozen=True)
class View:
    """How the pictures of one document are cropped and mirrored: all in the same way, so that an edit keeps its
    place.
    """

    place: tuple[float, float] = (0.5, 0.5)  # of the crop: 0 is the left or upper end, 1 the other end
    mirrored: bool = False


@dataclass(frozen=True)
class ImageReader:
    """Reads stored images.

    channels: of pictures, 1 (gray) or 3 (RGB).
    size: (height, width) to which flow pictures are scaled on their short side, and then cropped; None: they stay as
        they are.
    latents: whether the codec takes latents; then a flow image is an array, not a picture.
    seen: side in pixels to which the vision tower scales the largest pictures; a JPEG that is much larger is decoded at
    a
        lower resolution. None: pictures for the tower are decoded whole.
    """

    channels: int
    size: tuple[int, int] | None = None
    latents: bool = False
    seen: int | None = None

    def __call__(self, image: StoredImage, view: View = View()) -> Image:  # noqa: B008 - it is frozen
        """Raises ImageError."""
        flow = image.via == "flow"
        with opened(image) as file:
            if image.name.endswith(".npy"):
                pixels = _array(np.load(file, allow_pickle=False))
            elif flow and self.latents:
                raise ImageError(
                    f"the image {shorten(image.name)} is a picture, but the codec takes latents; give a .npy file"
                )
            else:
                pixels = from_pillow(self._flow(Picture(file), view) if flow else self._vit(Picture(file), view))
        return Image(pixels, image.generate, image.via, start=image.start)

    def file(self, path: str | Path, via: str = "flow") -> Image:
        """The image in a file. `via`: how the model sees it, "flow" or "vit". Raises ImageError."""
        return self(stored(locate(str(path), epath.Path()), via=via))

    def _flow(self, picture: Picture, view: View) -> Pillow.Image:
        opaque = picture.opaque(self.channels, max(self.size) if self.size else None)
        if self.size and opaque.size != (self.size[1], self.size[0]):
            opaque = ImageOps.fit(opaque, (self.size[1], self.size[0]), Pillow.Resampling.LANCZOS, centering=view.place)
        return ImageOps.mirror(opaque) if view.mirrored else opaque

    def _vit(self, picture: Picture, view: View) -> Pillow.Image:
        opaque = picture.opaque(self.channels, self.seen)
        return ImageOps.mirror(opaque) if view.mirrored else opaque


def reader_of(codec: Codec) -> ImageReader:
    """Reads the images that a user shows to the model.

    A lossy codec gets flow pictures scaled and cropped to its size. A lossless one refuses pictures of another size,
    because its likelihoods are of the pictures themselves.
    """
    scaled = codec.is_pixels and codec.log_volume is None
    return ImageReader(codec.image_channels, codec.image_shape[:2] if scaled else None)


@contextlib.contextmanager
def opened(image: StoredImage) -> Iterator[BinaryIO]:
    """The image's file, open for reading. Raises ImageError in place of what goes wrong within the block."""
    try:
        with image.open() as file:
            yield file
    except FileNotFoundError:
        raise ImageError(f"the image {shorten(image.name)} does not exist") from None
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Pillow.DecompressionBombError) as error:
        wanted = "an array of numbers" if image.name.endswith(".npy") else "a PNG or JPEG file"
        fault = "its format is unknown" if isinstance(error, Pillow.UnidentifiedImageError) else reason(error)
        raise ImageError(f"the image {shorten(image.name)} cannot be read ({fault}); give {wanted}") from None


def _array(array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError("it is no array (height, width, channels) of finite floating point numbers")
    return array.astype(np.float32)


def stored(path: epath.Path, generate: bool = False, via: str = "flow") -> StoredImage:
    """The image in a file: a picture, or an array in a .npy file."""
    return StoredImage(str(path), lambda: io.BytesIO(_content(path)), generate, via)


def _content(path: epath.Path) -> bytes:
    if "://" in str(path):
        return path.read_bytes()
    if Path(path).is_fifo():
        raise ValueError("it is a pipe, which is not opened: nobody may write into it")
    with path.open("rb") as file:
        return read_bytes(file, LARGEST)


def read_image(path: str | Path, channels: int) -> np.ndarray:
    """An image file -> pixels (height, width, C) fp32 in [-1, 1], upright and opaque. channels: C, 1 (gray) or 3 (RGB).

    A .npy file holds the array itself: pixels, or latents (h, w, D). Raises ImageError.
    """
    return ImageReader(channels).file(path).pixels


def locate(text: str, folder: epath.Path, what: str = "image") -> epath.Path:
    """The path that `text` names: on disk (relative to `folder`, absolute or file://) or in a bucket.

    what: the word for it in messages. Raises ImageError for other addresses.
    """
    if text.startswith("data:"):
        raise ImageError(f"the {what} is a data: URL; save it as a file and give its path")
    scheme, mark, path = text.partition("://")
    if not mark:
        return folder / text
    if scheme == "file":
        return epath.Path("/" + path.partition("/")[2])  # "file:///a/b" and "file://localhost/a/b"
    if scheme not in BUCKETS:
        raise ImageError(f"the {what} is the address {shorten(text)}; download it and give the path of the file")
    package, extra = BUCKETS[scheme]
    if not _installed(package):
        raise ImageError(f"{shorten(text)} needs {package}; install it with `pip install 'starflow2_jax[{extra}]'`")
    return epath.Path(text)


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def write_image(path: Path, image: np.ndarray, is_pixels: bool = True) -> Path:
    """Write pixels (height, width, C) in [-1, 1] to a PNG file, or any other array (not `is_pixels`) to a .npy file.

    Returns `path` with the suffix of the file's format.
    """
    if is_pixels:
        path = path.with_suffix(".png")
        as_pillow(image).save(path)
    else:
        path = path.with_suffix(".npy")
        np.save(path, image)
    return path


def from_pillow(image: Pillow.Image) -> np.ndarray:
    """A gray or RGB picture with 8 bits per level -> pixels (height, width, C) fp32 in [-1, 1]."""
    levels = np.asarray(image, np.float32)
    return levels.reshape(*levels.shape[:2], -1) * (2 / 255) - 1


def as_pillow(pixels: np.ndarray) -> Pillow.Image:
    """Pixels (height, width, C), C 1 or 3 -> a gray or RGB picture; values outside [-1, 1] are clipped."""
    levels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    return Pillow.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
