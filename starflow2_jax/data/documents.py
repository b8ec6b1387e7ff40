"""Documents: lists of text and image parts. Data sources make them, the sampler takes and returns them."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags
from PIL import Image as Pillow

from starflow2_jax.errors import UserError
from starflow2_jax.text_files import read_json_file

# EXIF's numbers. ImageOps.exif_transpose fails where another of the tags is damaged, for it writes them anew.
ORIENTATIONS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT, 3: Pillow.Transpose.ROTATE_180, 4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE, 6: Pillow.Transpose.ROTATE_270, 7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    text: str
    predict: bool = False  # does it count as a prediction in training


@dataclass(frozen=True, eq=False)
class Image:
    pixels: np.ndarray  # (height, width, C) fp32 in [-1, 1]; or the codec's latents (h, w, D), where it takes such
    generate: bool = False  # does it count as a prediction in training
    via: str = "flow"  # how the model sees it: "flow" tokens, or "vit" (the VLM's own vision tower, to understand only)


Document = list[Text | Image]
DROPS = 1  # sets the draws of CaptionsDropped apart from those of a source with the same seed
Said = str | np.ndarray | list[str | np.ndarray | Text | Image]


class DocumentError(UserError):
    """A document that cannot be read or does not fit; the message is one sentence for its author. `index`: which of
    several it is, where that is known."""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index


def compose(said: Said) -> Document:
    """A text, an image (an array as Image has it), or a list of such and of parts, as a document."""
    parts = said if isinstance(said, list) else [said]
    return [Text(p) if isinstance(p, str) else Image(p) if isinstance(p, np.ndarray) else p for p in parts]


def read_image(path: str | Path, channels: int, peak: int = 255) -> np.ndarray:
    """An image file -> (height, width, C) fp32 in [-1, 1]; `channels` 1 (gray) or 3. `peak` is the value of white.

    A .npy file holds such an array, or latents (h, w, D), as it is to be.
    """
    if Path(path).suffix == ".npy":
        return _read_array(Path(path))
    try:
        with Pillow.open(path) as image:
            return from_pillow(upright(image, channels), peak)
    except FileNotFoundError:
        raise DocumentError(f"the image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise DocumentError(f"the image {path} cannot be read ({error}); give a PNG or JPEG file") from None


def upright(image: Pillow.Image, channels: int) -> Pillow.Image:
    """The image as its camera was held, if that is told, gray or RGB, with 8 bits a level. Raises ValueError for 32 bits."""
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a level, whose white is not known")
    image.load()  # Pillow turns TIFF files itself, and forgets the tag
    turned = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    image = image if turned is None else image.transpose(turned)
    if image.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        image = Pillow.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DocumentError(f"the image {path} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
        raise DocumentError(f"the image {path} cannot be read ({error}); give an array of numbers") from None
    if array.ndim != 3 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DocumentError(
            f"the image {path} must be an array (height, width, channels) of finite floating point numbers"
        )
    return array.astype(np.float32)


def write_image(path: Path, image: np.ndarray, is_pixels: bool = True) -> Path:
    """Pixels (height, width, C) in [-1, 1] -> a PNG file; where not `is_pixels`, an array of any numbers -> a .npy file.

    `path` has no suffix; returns it with one.
    """
    if is_pixels:
        path = path.with_suffix(".png")
        as_pillow(image).save(path)
    else:
        path = path.with_suffix(".npy")
        np.save(path, image)
    return path


def from_pillow(image: Pillow.Image, peak: int = 255) -> np.ndarray:
    """(height, width, C) fp32 in [-1, 1]."""
    levels = np.asarray(image, np.float32)
    return levels.reshape(*levels.shape[:2], -1) * (2 / peak) - 1


def as_pillow(pixels: np.ndarray) -> Pillow.Image:
    levels = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    return Pillow.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def from_json(parts: object, folder: Path, channels: int) -> Document:
    """The JSON form of a document: a list of {"text": str, "predict": bool} and {"image": path, "generate": bool, "via": str}.

    Image paths are relative to `folder`. Raises DocumentError.
    """
    if not isinstance(parts, list) or not parts:
        raise DocumentError('a document is a non-empty list of {"text": ...} and {"image": ...} parts')
    return [_part(i, part, folder, channels) for i, part in enumerate(parts)]


def _part(i: int, part: object, folder: Path, channels: int) -> Text | Image:
    kinds = {"text": {"text": str, "predict": bool}, "image": {"image": str, "generate": bool, "via": str}}
    kind = next((k for k in kinds if isinstance(part, dict) and k in part), None)
    if isinstance(part, dict) and "video" in part:
        raise DocumentError(
            f"part {i} of the document is a video, which this model does not take; give frames as images"
        )
    if kind is None:
        raise DocumentError(f'part {i} of the document is neither {{"text": ...}} nor {{"image": ...}}')
    for key, value in part.items():
        if not isinstance(value, kinds[kind].get(key, ())):
            raise DocumentError(
                f"part {i} of the document: {key!r} is not a key of a {kind} part, or its value has the wrong type"
            )
    if kind == "text":
        return Text(**part)
    if part.get("via", "flow") not in ("flow", "vit"):
        raise DocumentError(f'part {i} of the document: "via" is "flow" or "vit", not {part["via"]!r}')
    return Image(read_image(folder / part["image"], channels), part.get("generate", False), part.get("via", "flow"))


def read_document(path: str | Path, channels: int) -> Document:
    """A JSON file of one document -> Document."""
    path = Path(path)
    return from_json(read_json_file(path, DocumentError), path.parent, channels)


class CaptionsDropped(Rows):
    """The documents of `source`, endlessly repeated, a `share` of their captions left out: of other ones each time round.

    Document i depends on (seed, i) alone, so a position in the data says all.
    """

    def __init__(self, source: Rows[Document], share: float, seed: int):
        self.source, self.share, self.seed = source, share, seed

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Document:
        document = self.source[index % len(self.source)]
        drop = np.random.default_rng((self.seed, index, DROPS)).random() < self.share
        return without_caption(document) if drop else document


def without_caption(document: Document) -> Document:
    """The document without the text that it opens with, where it predicts nothing but the image that it ends with.

    Guidance compares with images that no words led to. Where words or other images are predicted too, they need the text.
    """
    *before, last = document
    if not (isinstance(last, Image) and last.generate) or any(counts(part) for part in before):
        return document
    first = next(i for i, part in enumerate(document) if isinstance(part, Image))
    return document[first:]


def counts(part: Text | Image) -> bool:
    """As a prediction, in training and in scores."""
    return part.generate if isinstance(part, Image) else part.predict


class Shown(Rows):
    """The documents of `source`, their images shown through the vision tower and every word of them to be predicted."""

    def __init__(self, source: Rows[Document]):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document:
        return [Text(p.text, True) if isinstance(p, Text) else Image(p.pixels, via="vit") for p in self.source[index]]
