"""Pictures for the vision tower, scaled down to the positions that a row has left for them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image as Pillow

from starflow2_jax.data.documents import Document, Image, ImageError, LengthError
from starflow2_jax.data.images import as_pillow, from_pillow
from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sampling.engine import Sampler

Size = tuple[int, int]  # (height, width) in pixels


def fitted(sampler: Sampler, document: Document, answer: int) -> Document:
    """The document with its pictures "vit" no larger than a row has room for beside the other parts and the answer.

    answer: positions of the answer. Raises DocumentError if a picture cannot be scaled down that far.
    """
    seen = {i: part for i, part in enumerate(document) if isinstance(part, Image) and part.via == "vit"}
    if not seen or (vision := sampler.encoder.vision) is None:
        return document
    dot = np.zeros((1, 1, sampler.codec.image_channels), np.float32)
    small = [replace(seen[i], pixels=dot) if i in seen else part for i, part in enumerate(document)]
    others = len(sampler.encoder(small, closed=False)["tokens"]) - len(seen) * math.prod(vision.merged_grid((1, 1)))
    room = sampler.max_positions - answer - others
    files: list[Size] = [image.pixels.shape[:2] for image in seen.values()]
    sizes = dict(zip(seen, shared(vision, vision, files, room, sampler.max_positions), strict=True))
    return [_scaled(vision, seen[i], sizes[i]) if i in seen else part for i, part in enumerate(document)]


def _scaled(vision: VisionConfig, image: Image, size: Size) -> Image:
    """The picture at `size`, or as it is if the tower would see it at this size anyway."""
    if vision.resized(image.pixels.shape[:2]) == size:
        return image
    height, width = size
    smaller = as_pillow(image.pixels).resize((width, height), Pillow.Resampling.BICUBIC)
    return replace(image, pixels=from_pillow(smaller))


def shared(vision: VisionConfig, asked: VisionConfig, files: Sequence[Size], room: int, row: int) -> list[Size]:
    """The (height, width) at which the tower sees each picture, so that all of them take at most `room` positions.

    A picture that needs more than an equal share of `room` is scaled down to that share. Positions that smaller
    pictures do not need are shared among the others. `asked`: the tower with the bounds in pixels that the caller
    wants. `files`: (height, width) of the pictures. `row`: number of positions of a row, which the messages name.
    Raises ImageError for a picture that the tower refuses, and LengthError for one that cannot be scaled down to its
    share, each with its index.
    """
    sizes = [_resized(vision, asked, size, i) for i, size in enumerate(files)]
    wanted = [math.prod(vision.merged_grid(size)) for size in sizes]
    order, left = sorted(range(len(sizes)), key=wanted.__getitem__), room
    for done, i in enumerate(order):
        share = max(left, 0) // (len(order) - done)
        if wanted[i] > share:
            most = max(share, 1) * math.prod(sizes[i]) // wanted[i]  # pixels
            sizes[i] = vision.bounded(1, most).resized(files[i])
            if (least := math.prod(vision.merged_grid(sizes[i]))) > share:
                height, width = files[i]
                raise LengthError(
                    f"a picture of {width}x{height} pixels takes at least {least} positions, and of the {row} "
                    f"positions of a row {max(left, 0)} are left for {len(order) - done} "
                    f"{'pictures' if len(order) - done > 1 else 'picture'}; shorten the text, or send fewer pictures",
                    i,
                )
        left -= math.prod(vision.merged_grid(sizes[i]))
    return sizes


def _resized(vision: VisionConfig, asked: VisionConfig, size: Size, index: int) -> Size:
    try:
        return vision.resized(asked.resized(size))
    except ValueError as error:
        raise ImageError(str(error), index) from None
