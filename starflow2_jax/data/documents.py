"""Documents: lists of text parts and image parts. Sources make them; the sampler takes and returns them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image as Pillow

from starflow2_jax.data.pictures import Picture
from starflow2_jax.errors import UserError
from starflow2_jax.text_files import read_json_file, reason, shorten


@dataclass(frozen=True)
class Text:
    text: str
    predict: bool = False  # whether it counts as a prediction in training


@dataclass(frozen=True, eq=False)
class Image:
    pixels: np.ndarray  # (height, width, C) fp32 in [-1, 1]; or latents (h, w, D), if the codec takes latents
    generate: bool = False  # whether it counts as a prediction in training
    via: str = (
        "flow"  # the model sees it as "flow" tokens, or through "vit", the VLM's vision tower, which generates nothing
    )


Document = list[Text | Image]
DROPS = 1  # keeps the draws of CaptionsDropped apart from the draws of a source with the same seed
Said = str | np.ndarray | list[str | np.ndarray | Text | Image]


class Documents(Protocol):
    """Documents by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


class DocumentError(UserError):
    """A document that cannot be read or does not fit. The message is one sentence for its author.

    index: the document's place among several, if it is known.
    """

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index


def compose(said: Said) -> Document:
    """A document of one text, of one image (an array like `Image.pixels`), or of a list of texts, images and parts."""
    parts = said if isinstance(said, list) else [said]
    return [Text(p) if isinstance(p, str) else Image(p) if isinstance(p, np.ndarray) else p for p in parts]


def read_image(path: str | Path, channels: int) -> np.ndarray:
    """An image file -> pixels (height, width, C) fp32 in [-1, 1], upright and opaque. channels: C, 1 (gray) or 3 (RGB).

    A .npy file holds the array itself: pixels, or latents (h, w, D). Raises DocumentError.
    """
    _refuse_address(str(path))
    if Path(path).suffix == ".npy":
        return _read_array(Path(path))
    try:
        with open(path, "rb") as file:
            return from_pillow(Picture(file).opaque(channels))
    except FileNotFoundError:
        raise DocumentError(f"the image {shorten(path)} does not exist") from None
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise DocumentError(
            f"the image {shorten(path)} cannot be read ({reason(error)}); give a PNG or JPEG file"
        ) from None


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DocumentError(f"the image {shorten(path)} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
        raise DocumentError(
            f"the image {shorten(path)} cannot be read ({reason(error)}); give an array of numbers"
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DocumentError(
            f"the image {shorten(path)} must be an array (height, width, channels) of finite floating point numbers"
        )
    return array.astype(np.float32)


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


def from_json(parts: object, folder: Path, channels: int) -> Document:
    """The document that a JSON value describes.

    parts: a list of {"text": str, "predict": bool} and {"image": path, "generate": bool, "via": str}; only "text" and
        "image" are required. A path is relative to `folder`.
    channels: of images that are read from files, 1 (gray) or 3 (RGB).

    Raises DocumentError.
    """
    if not isinstance(parts, list) or not parts:
        raise DocumentError('a document is a non-empty list of {"text": ...} and {"image": ...} parts')
    return [_part(i, part, folder, channels) for i, part in enumerate(parts)]


PART_KEYS = {"text": {"text": str, "predict": bool}, "image": {"image": str, "generate": bool, "via": str}}
JSON_TYPES = {str: "a string", bool: "true or false"}


def _part(i: int, part: object, folder: Path, channels: int) -> Text | Image:
    where = f"part {i} of the document"
    kind = next((kind for kind in PART_KEYS if isinstance(part, dict) and kind in part), None)
    if isinstance(part, dict) and "video" in part:
        raise DocumentError(f"{where} is a video, which this model does not take; give frames as images")
    if not isinstance(part, dict) or kind is None:
        raise DocumentError(f'{where} is neither {{"text": ...}} nor {{"image": ...}}')
    keys = PART_KEYS[kind]
    for key, value in part.items():
        if key not in keys:
            raise DocumentError(
                f"{where} has the key {shorten(repr(key))}; the keys of a {kind} part are {', '.join(keys)}"
            )
        if not isinstance(value, keys[key]):
            raise DocumentError(f"{where}: the value of {key!r} must be {JSON_TYPES[keys[key]]}")
    if kind == "text":
        return Text(**part)
    if part.get("via", "flow") not in ("flow", "vit"):
        raise DocumentError(f'{where}: "via" is "flow" or "vit", not {shorten(repr(part["via"]))}')
    try:
        _refuse_address(part["image"])
        pixels = read_image(folder / part["image"], channels)
    except DocumentError as error:
        raise DocumentError(f"{where}: {error}") from None
    return Image(pixels, part.get("generate", False), part.get("via", "flow"))


def _refuse_address(path: str) -> None:
    """Raises DocumentError for a URL where the path of a file belongs."""
    if path.startswith("data:"):
        raise DocumentError("the image is a data: URL; save it as a file and give its path")
    if "://" in path:
        raise DocumentError(f"the image is the address {shorten(path)}; download it and give the path of the file")


def read_document(path: str | Path, channels: int) -> Document:
    """The document in a JSON file (see `from_json`). Raises DocumentError."""
    path = Path(path)
    return from_json(read_json_file(path, DocumentError), path.parent, channels)


class CaptionsDropped:
    """The documents of `source`, repeated endlessly, with a `share` of their captions dropped at random.

    Each repetition drops other captions. Document i depends on `seed` and i alone, so a reader resumes from i.
    """

    def __init__(self, source: Documents, share: float, seed: int):
        self.source, self.share, self.seed = source, share, seed

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Document:
        document = self.source[index % len(self.source)]
        drop = np.random.default_rng((self.seed, index, DROPS)).random() < self.share
        return without_caption(document) if drop else document


def without_caption(document: Document) -> Document:
    """The document without its opening text, if the only part that it predicts is the image at its end.

    Guidance needs a model of images without captions. If another part is predicted, it may depend on the text, so the
    text stays.
    """
    *before, last = document
    if not (isinstance(last, Image) and last.generate) or any(counts(part) for part in before):
        return document
    first = next(i for i, part in enumerate(document) if isinstance(part, Image))
    return document[first:]


def counts(part: Text | Image) -> bool:
    """Whether the part counts as a prediction, in training and in scores."""
    return part.generate if isinstance(part, Image) else part.predict


class Shown:
    """The documents of `source`, with all images shown through the vision tower and all text predicted."""

    def __init__(self, source: Documents):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        return [Text(p.text, True) if isinstance(p, Text) else Image(p.pixels, via="vit") for p in self.source[index]]
