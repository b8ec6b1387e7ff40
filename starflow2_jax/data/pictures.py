"""Image files -> upright, opaque pictures. Training, sampling, evaluation and the server read their images here."""

import io
import zlib
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, ImageFile
from PIL import Image as Pillow

# By EXIF's number. ImageOps.exif_transpose also rewrites the tags, and fails if another of them is damaged.
ORIENTATIONS: dict[Any, Pillow.Transpose] = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # of a PNG file; all others are metadata
WHITE_16_BIT = 65535
SPARE = 1.5  # a filter then scales the rest, so that the picture is as sharp as if it were scaled at once


class Picture:
    """An image file whose header has been read. `size`: (width, height) in pixels, as the file stores them.

    file: open for reading bytes. formats: names of Pillow's formats that are allowed; None: all.
    A PNG file with damaged or oversized metadata is read without its metadata.
    Raises OSError, SyntaxError, ValueError or Pillow's DecompressionBombError for a file that cannot be read.
    """

    def __init__(self, file: BinaryIO, formats: list[str] | None = None):
        self._file, self._formats = file, formats
        try:
            self._image = self._open(file)
        except Exception as error:  # damaged metadata raises many kinds of exceptions
            self._image = self._open_without_metadata(error)
        self.size: tuple[int, int] = self._image.size

    def opaque(self, channels: int, side: int | None = None) -> Pillow.Image:
        """The picture as its camera was held, with transparency laid on white; `channels` 1: gray ("L"), 3: "RGB".

        side: the picture will be scaled down, and none of its sides below this length in pixels; a format that can be
            decoded at a lower resolution (JPEG) then is, with sides of at least SPARE times this length. None: whole.
        Levels have 8 bits. Raises ValueError for a file with 32 bits per level, and the exceptions above.
        """
        if side is not None:
            self.drafted(side)
        try:
            image = _opaque(self._image)
        except Exception as error:
            image = _opaque(self._open_without_metadata(error))
        return image.convert("L" if channels == 1 else "RGB")

    def drafted(self, side: int) -> tuple[int, int]:
        """The (width, height) at which `opaque` decodes the picture for this `side`. Later calls of `opaque` keep to
        it.
        """
        least = int(SPARE * side)
        self._image.draft(None, (least, least))
        return self._image.size

    def _open(self, file: BinaryIO) -> ImageFile.ImageFile:
        file.seek(0)
        return Pillow.open(file, formats=self._formats)

    def _open_without_metadata(self, error: Exception) -> ImageFile.ImageFile:
        """Try again after `error`; raises it if the file is no PNG."""
        self._file.seek(0)
        if self._file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise error
        return self._open(io.BytesIO(PNG_SIGNATURE + b"".join(_pixel_chunks(self._file.read()))))


def _pixel_chunks(chunks: bytes) -> list[bytes]:
    """A PNG file's chunks that make its pixels, and a sound eXIf chunk, which holds the orientation."""
    kept, start = [], 0
    while start < len(chunks):
        end = start + 12 + int.from_bytes(chunks[start : start + 4])
        kind = chunks[start + 4 : start + 8]
        sound = zlib.crc32(chunks[start + 4 : end - 4]) == int.from_bytes(chunks[end - 4 : end])
        if kind in PIXEL_CHUNKS or (kind == b"eXIf" and sound):
            kept.append(chunks[start:end])
        start = end
    return kept


def _opaque(image: ImageFile.ImageFile) -> Pillow.Image:
    """The whole image, upright, on white, with 8 bits per level."""
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per level, and which level is white is not known")
    stored = str(image.tile[0][3]) if image.tile else ""  # how levels are stored; a PNG's is "L;4" or "RGB;16B"
    image.load()  # Pillow turns TIFF files itself while it loads them, and then removes the tag
    turn = _turn(image)
    opaque = _on_white(image, stored)
    return opaque if turn is None else opaque.transpose(turn)


def _turn(image: Pillow.Image) -> Pillow.Transpose | None:
    """How to turn the image as its camera was held; None if it is upright or its metadata are damaged."""
    try:
        return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged metadata raises many kinds of exceptions
        return None


def _on_white(image: Pillow.Image, stored: str) -> Pillow.Image:
    """The image with its transparent parts laid on white and at most 8 bits per level."""
    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float32)
        levels = levels if key is None else np.where(levels == key, WHITE_16_BIT, levels)
        return Pillow.fromarray(np.round(levels / 257).astype(np.uint8))
    if image.mode in ("1", "L", "RGB") and isinstance(key, int | tuple):  # one level or colour is transparent
        image = image.convert("L") if image.mode == "1" else image
        levels = np.asarray(image)
        where = (levels.reshape(*levels.shape[:2], -1) == _scaled_key(key, stored)).all(-1)
        opaque = np.where(where if levels.ndim == 2 else where[..., None], np.uint8(255), levels)
        return Pillow.fromarray(opaque)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        return Pillow.alpha_composite(Pillow.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _scaled_key(key: int | tuple[int, ...], stored: str) -> np.ndarray:
    """A PNG's transparent level or colour, scaled to the 8 bits that Pillow gives a level. It has the file's bits."""
    levels = np.atleast_1d(key)
    if stored.endswith("16B"):
        return levels >> 8
    return levels * {"L;2": 85, "L;4": 17}.get(stored, 1)
