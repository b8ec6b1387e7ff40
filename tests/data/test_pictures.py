"""Image files become opaque pictures: transparency is laid on white, and damaged metadata do not matter."""

import base64
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow

from starflow2_jax.data.images import read_image
from starflow2_jax.data.pictures import PNG_SIGNATURE
from starflow2_jax.serving.images import upload

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (6, 8, 4), np.uint8)
RGBA[0, :4, 3], RGBA[1, :4, 3] = 0, 255
LA = RGBA[..., [0, 3]]
INDEX = RNG.integers(0, 3, (6, 8)).astype(np.uint8)
PALETTE = np.array([[0, 0, 0], [0, 0, 0], [200, 30, 90]], np.uint8)  # transparent black, black strokes, a colour


def on_white(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Levels 0..255 (H, W, C) over white; opacity (H, W) in 0..1."""
    return colors * opacity[..., None] + 255 * (1 - opacity[..., None])


def luma(colors: np.ndarray) -> np.ndarray:
    """Gray of RGB, by ITU-R 601; gray stays."""
    return colors @ [0.299, 0.587, 0.114] if colors.shape[-1] == 3 else colors[..., 0]


def palette_image() -> Pillow.Image:
    image = Pillow.fromarray(INDEX, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def save_rgba(path: Path, **options) -> None:
    Pillow.fromarray(RGBA).save(path, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def png(levels: np.ndarray, bits: int, *metadata: bytes, after: bytes = b"") -> bytes:
    """Gray (H, W) or RGB (H, W, 3) levels with `bits` bits -> a PNG file, with chunks before and after its pixels."""
    digits = (levels.reshape(len(levels), -1, 1) >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.reshape(len(levels), -1).astype(np.uint8), axis=1)
    header = struct.pack(">LLBBBBB", levels.shape[1], levels.shape[0], bits, 0 if levels.ndim == 2 else 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return PNG_SIGNATURE + b"".join(
        [chunk(b"IHDR", header), *metadata, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    )


def agrees(path: Path, wanted: np.ndarray, tolerance: float = 1.5) -> None:
    """The file read as RGB and as gray gives `wanted`, levels 0..255 (H, W, 1 or 3), up to rounding."""
    for channels in (1, 3):
        levels = (read_image(path, channels) + 1) * 127.5
        target = luma(wanted)[..., None] if channels == 1 else np.broadcast_to(wanted, (*wanted.shape[:2], 3))
        np.testing.assert_allclose(levels, target, atol=tolerance)


@pytest.mark.parametrize(
    "name, options",
    [("a.png", {}), ("a.webp", {"lossless": True, "exact": True}), ("a.tiff", {}), ("a.jp2", {"irreversible": False})],
)
def test_partly_transparent_colors(tmp_path, name, options):
    save_rgba(tmp_path / name, **options)
    agrees(tmp_path / name, on_white(RGBA[..., :3], RGBA[..., 3] / 255))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_partly_transparent_gray(tmp_path, name):
    Pillow.fromarray(LA, "LA").save(tmp_path / name)
    agrees(tmp_path / name, on_white(LA[..., :1], LA[..., 1] / 255))


@pytest.mark.parametrize("transparency", [0, bytes([0, 255, 255]), bytes([0, 255, 80])])
def test_transparent_colors_of_a_palette(tmp_path, transparency):
    palette_image().save(tmp_path / "a.png", transparency=transparency)
    opacity = np.array([0, 255, 255] if transparency == 0 else list(transparency)) / 255
    agrees(tmp_path / "a.png", on_white(PALETTE[INDEX], opacity[INDEX]))


@pytest.mark.parametrize("colors", [PALETTE, np.repeat(np.arange(3, dtype=np.uint8)[:, None], 3, 1)])
def test_transparent_colors_of_a_gif(tmp_path, colors):
    image = palette_image()
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "a.gif", transparency=0)
    assert Pillow.open(tmp_path / "a.gif").info["transparency"] == 0
    agrees(tmp_path / "a.gif", on_white(colors[INDEX], (INDEX > 0).astype(float)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("key", ["darkest", "lightest", "none"])
def test_one_transparent_level_of_gray(tmp_path, bits, key):
    most = 2**bits - 1
    levels = RNG.integers(0, most + 1, (6, 8))
    levels[0, :2] = 0, most
    transparent = {"darkest": 0, "lightest": most, "none": None}[key]
    chunks = [] if transparent is None else [chunk(b"tRNS", struct.pack(">H", transparent))]
    (tmp_path / "a.png").write_bytes(png(levels, bits, *chunks))
    agrees(tmp_path / "a.png", on_white(levels[..., None] * 255 / most, (levels != transparent).astype(float)))


@pytest.mark.parametrize("bits", [8, 16])
def test_one_transparent_color(tmp_path, bits):
    most = 2**bits - 1
    levels = RNG.integers(0, most + 1, (6, 8, 3))
    levels[:2] = 0, most // 2, 0
    key = chunk(b"tRNS", struct.pack(">HHH", *levels[0, 0]))
    (tmp_path / "a.png").write_bytes(png(levels, bits, key))
    opacity = np.ones((6, 8))
    opacity[:2] = 0
    agrees(tmp_path / "a.png", on_white(levels * 255 / most, opacity))


GRAY = RNG.integers(0, 256, (4, 6))
TURNED = chunk(b"eXIf", b"MM\0*" + struct.pack(">LHHHLHHL", 8, 1, 0x0112, 3, 1, 6, 0, 0))


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**22))),
        chunk(b"tEXt", b"Comment\0" + b"a" * 2**21),
        chunk(b"tEXt", b"Comment\0fine")[:-1] + b"x",
        chunk(b"zTXt", b"Comment\0\0no zlib"),
        chunk(b"iTXt", b"Comment\0\1\0\0\0no zlib"),
        chunk(b"iCCP", b"profile\0\7broken"),
        chunk(b"pHYs", b"\0"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"abc"),
        chunk(b"eXIf", b"no tags"),
        chunk(b"acTL", b"\0"),
        chunk(b"fcTL", b"\0"),
        chunk(b"tIME", b"")[:-4] + b"\0\0\0\0",
    ],
    ids=lambda c: repr(c[4:20]),
)
def test_a_whole_png_with_damaged_or_large_metadata(tmp_path, metadata):
    """Before or after the pixels; the orientation is still heeded."""
    for file in (png(GRAY, 8, metadata), png(GRAY, 8, after=metadata)):
        (tmp_path / "a.png").write_bytes(file)
        agrees(tmp_path / "a.png", GRAY[..., None])
    if metadata[4:8] != b"eXIf":
        (tmp_path / "a.png").write_bytes(png(GRAY, 8, metadata, TURNED))
        agrees(tmp_path / "a.png", np.rot90(GRAY, -1)[..., None])


@pytest.mark.parametrize("damaged", [False, True])
def test_the_server_reads_images_alike(tmp_path, damaged):
    """Transparency, and damaged metadata after the pixels. The image is counted once against the request's budget."""
    save_rgba(tmp_path / "a.png")
    if damaged:
        (tmp_path / "a.png").write_bytes(png(GRAY, 8, TURNED, after=chunk(b"tEXt", b"Comment\0fine")[:-1] + b"x"))
    counted = []
    limits = SimpleNamespace(channels=3, size=None, vision=None, max_pixels=100, positions=100)
    budget = SimpleNamespace(limits=limits, take=lambda *given: counted.append(given))
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    sent = upload(url, "vit", limits, "here").decode(budget)
    np.testing.assert_array_equal(sent, read_image(tmp_path / "a.png", 3))
    assert counted == [((6, 4) if damaged else (8, 6), "vit", "here", None)]
