"""Pictures of unusual kinds and sizes, as a run reads them online and as `encode` stores them."""

import io
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image as Pillow
from refused import refused

from starflow2_jax.data.documents import ImageError, StoredImage
from starflow2_jax.data.encoded import EncodedDocuments
from starflow2_jax.data.encoding import Encoding, encode
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.readers import Found

TOP, BOTTOM = (200, 40, 90), (20, 120, 220)
HALVES = np.repeat(np.array([TOP, BOTTOM], np.uint8), 32, axis=0)[:, None].repeat(64, axis=1)  # (64, 64, 3)
READER = ImageReader(3, (16, 16))


def saved(image: Pillow.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    """A photo that lies on its side, and says so: the camera was turned by a quarter."""
    exif = Pillow.Exif()
    exif[0x0112] = 6
    return saved(Pillow.fromarray(HALVES[::-1]).transpose(Pillow.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def palette() -> bytes:
    """Where the lower half would be, nothing: it is white."""
    image = Pillow.fromarray(HALVES).quantize(4)
    clear = image.getpixel((0, 63))
    return saved(image, "PNG", transparency=clear)


def animated() -> bytes:
    frames = [Pillow.fromarray(HALVES[:, 4:]), Pillow.new("RGB", (60, 64))]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


def deep() -> bytes:
    gray = np.where(np.arange(64)[:, None] < 32, 51400, 5140).astype(np.uint16).repeat(64, axis=1)
    return saved(Pillow.fromarray(gray), "PNG")


PICTURES = {
    "CMYK": (saved(Pillow.fromarray(HALVES).convert("CMYK"), "JPEG", quality=95), TOP, BOTTOM),
    "16 bits": (deep(), (200,) * 3, (20,) * 3),
    "animated": (animated(), TOP, BOTTOM),
    "EXIF-turned": (turned(), BOTTOM, TOP),
    "palette": (palette(), TOP, (255,) * 3),
    "50 megapixels": (
        saved(Pillow.fromarray(HALVES).resize((7200, 7200), Pillow.Resampling.NEAREST), "PNG", compress_level=1),
        TOP,
        BOTTOM,
    ),
}


def stored(content: bytes) -> StoredImage:
    return StoredImage("a picture", lambda: io.BytesIO(content), generate=True)


def agrees(pixels: np.ndarray, name: str) -> None:
    _, top, bottom = PICTURES[name]
    levels = (pixels + 1) * 127.5
    np.testing.assert_allclose(levels[2, 8], top, atol=6)
    np.testing.assert_allclose(levels[13, 8], bottom, atol=6)


@pytest.mark.parametrize("name", PICTURES)
def test_online(name):
    agrees(READER(stored(PICTURES[name][0])).pixels, name)


class Pictures:
    def __init__(self, contents: list[bytes]):
        self.contents, self.units = contents, len(contents)

    def read(self, first: int, last: int):
        return (Found(i, str(i), [stored(self.contents[i])]) for i in range(first, last))


def test_encoded(tmp_path: Path):
    """A large picture becomes a small JPEG file; a truncated one is listed."""
    cut = PICTURES["CMYK"][0][:-200]
    reader = Pictures([*(content for content, *_ in PICTURES.values()), cut])
    index = encode(reader, epath.Path(tmp_path), Encoding(source="", shards=2, size=32))
    assert index["documents"] == len(PICTURES) and index["skipped"] == {"image": 1}
    source = EncodedDocuments(str(tmp_path))
    for i, name in enumerate(PICTURES):
        agrees(READER(source[i][0]).pixels, name)
        assert len(source[i][0].open().read()) < 5000


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(share):
    content = saved(Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    refused(ImageError, READER, stored(content[: int(len(content) * share)]), saying=("cannot be read",))
