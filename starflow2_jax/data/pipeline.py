"""Documents -> the features of a sequence, and features of many documents -> packed rows."""

from functools import lru_cache, partial
from typing import Any

import grain
import numpy as np

from starflow2_jax import sequence
from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.data.documents import Document, DocumentError, Image, LengthError, counts
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.vlm import VisionConfig
from starflow2_jax.sequence import Pictures, Sequence, Shape, VisionInput

Run = tuple[list[int], int, float, tuple[int, int] | None]  # token ids, their modality and weight, grid of an image


class Encoder:
    """Turns a Document into the features of one sequence: tokens, positions, latents and weights of predictions.

    remembered: the number of texts whose tokens are cached, for documents whose texts recur. pictures: leave the
    pictures for the step to encode (sequence.Pictures).
    """

    def __init__(
        self,
        tokenizer: Any,
        codec: Codec,
        vision: VisionConfig | None = None,
        remembered: int = 0,
        pictures: bool = False,
    ):
        self.tokenizer, self.codec, self.vision, self.pictures = tokenizer, codec, vision, pictures
        self.ids, self.remembered = TokenIds.of(tokenizer), remembered
        self._make_tokenize()

    def _make_tokenize(self) -> None:
        tokenize = partial(self.tokenizer.encode, add_special_tokens=False)
        self.tokenize = lru_cache(self.remembered)(tokenize) if self.remembered else tokenize

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokenize"}  # a cache is not pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._make_tokenize()

    def __call__(self, document: Document, closed: bool = True) -> dict[str, np.ndarray]:
        """Features, each with one leading axis: positions (s), flow images (m) or patches (p). Raises DocumentError.

        "part" (s,) is the index of the part that a position belongs to; the closing token belongs to the last part.
        closed: end with <|im_end|>, which counts as a prediction if the last part does.
        """
        runs: list[Run] = []
        images: list[Image] = []
        seen: list[Image] = []
        owners: list[int] = []
        predicted = False
        for i, part in enumerate(document):
            before = len(runs)
            predicted = counts(part)
            if isinstance(part, Image):
                runs += self._image(part, images, seen)
            else:
                runs.append((self.tokenize(part.text), sequence.TEXT, float(predicted), None))
            owners += [i] * sum(len(ids) for ids, *_ in runs[before:])
        if closed:
            runs.append(([self.ids.end], sequence.TEXT, float(predicted), None))
            owners.append(len(document) - 1)
        h, w = self.codec.grid
        return {
            **_lay_out(runs),
            "part": np.array(owners, np.int32),
            "latents": np.stack([self._latents(i) for i in images])
            if images
            else np.zeros((0, h * w, self.codec.channels), np.float32),
            "image_weight": np.array([i.generate for i in images], np.float32),
            **(self._pictures(images) if self.pictures else {}),
            **self._patches(seen),
        }

    def _image(self, part: Image, images: list[Image], seen: list[Image]) -> list[Run]:
        """The runs of an image, which is added to `images` (via "flow") or `seen` (via "vit")."""
        flow = part.via == "flow"
        if flow:
            images.append(part)
            grid_of = self._flow_grid
        else:
            if self.vision is None:
                raise DocumentError('this model has no vision tower; show the image via "flow"')
            if part.encoded:
                raise DocumentError('an encoded image is shown via "flow" only; encode its source with --via vit')
            if part.generate:
                raise DocumentError('an image shown via "vit" cannot be generated; use via "flow"')
            if (channels := part.pixels.shape[-1]) not in (1, self.vision.channels):
                raise DocumentError(
                    f'an image shown via "vit" has pixels of 1 or {self.vision.channels} channels, not {channels}; '
                    f'latents are shown via "flow"'
                )
            seen.append(part)
            grid_of = self.vision.merged_grid
        try:
            h, w = grid_of((part.pixels.shape[0], part.pixels.shape[1]))
        except ValueError as error:
            raise DocumentError(str(error)) from None
        weight = float(counts(part))
        return [
            ([self.ids.vision_start], sequence.TEXT, weight, None),
            ([self.ids.image] * (h * w), sequence.FLOW if flow else sequence.VIT, 0.0, (h, w)),
            ([self.ids.vision_end], sequence.TEXT, weight, None),
        ]

    def _flow_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The codec's grid, whatever the image's size; `_latents` refuses an image of another size."""
        return self.codec.grid

    def _latents(self, part: Image) -> np.ndarray:
        shape = (*self.codec.grid, self.codec.channels)
        if part.encoded:
            if part.pixels.shape != shape:
                raise DocumentError(
                    f"an image's latents have the shape {part.pixels.shape}, and the codec's are {shape}"
                )
            return part.pixels.reshape(-1, self.codec.channels).astype(np.float32)
        if self.pictures:
            return np.zeros((shape[0] * shape[1], shape[2]), np.float32)
        try:
            return self.codec.encode(part.pixels[None])[0].reshape(-1, self.codec.channels).astype(np.float32)
        except ValueError as error:
            raise DocumentError(str(error)) from None

    def _pictures(self, images: list[Image]) -> dict[str, np.ndarray]:
        """The pixels of the images that are pictures, and which these are."""
        pixels = np.zeros((len(images), *self.codec.image_shape), np.uint8)
        for place, image in zip(pixels, images, strict=True):
            if not image.encoded:
                try:
                    require_shape(image.pixels[None], self.codec.image_shape, "pixels")
                except ValueError as error:
                    raise DocumentError(str(error)) from None
                place[:] = np.rint((image.pixels + 1) * 127.5).clip(0, 255)
        return {"pixels": pixels, "waiting": np.array([not image.encoded for image in images], bool)}

    def _patches(self, seen: list[Image]) -> dict[str, np.ndarray]:
        if self.vision is None:
            return {}
        width = self.vision.patch_width
        parts = [self.vision.preprocess(p.pixels) for p in seen]
        counts = [len(p["patches"]) for p in parts]
        first = np.cumsum([0] + [p["window"].max() + 1 for p in parts])  # id of each image's first window
        shifted = [p["window"] + offset for p, offset in zip(parts, first, strict=False)]
        return {
            "patches": np.concatenate([np.zeros((0, width), np.float32)] + [p["patches"] for p in parts]),
            "coordinates": np.concatenate([np.zeros((0, 2), np.int32)] + [p["coordinates"] for p in parts]),
            "image": np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            "window": np.concatenate([np.zeros(0, np.int32), *shifted]),
        }


def _lay_out(runs: list[Run]) -> dict[str, np.ndarray]:
    """The features of positions, rotary positions included."""
    tokens, modality, weight, positions = [], [], [], []
    offset = 0  # of the next run's rotary positions
    for ids, kind, w, grid in runs:
        tokens += ids
        modality += [kind] * len(ids)
        weight += [w] * len(ids)
        if grid is None:
            positions.append(sequence.text_positions(offset, len(ids)))
            offset += len(ids)
        else:
            where, offset = sequence.image_positions(offset, grid)
            positions.append(where)
    return {
        "tokens": np.array(tokens, np.int32),
        "modality": np.array(modality, np.int32),
        "text_weight": np.array(weight, np.float32),
        "positions": np.concatenate(positions).astype(np.int32),
    }


def lengths(shape: Shape, vision: bool, pictures: bool = False) -> dict[str, int]:
    """The length of each feature of a row. vision: the model has a vision tower. pictures: as for Encoder."""
    names = {
        ("tokens", "modality", "text_weight", "positions"): shape.length,
        ("latents", "image_weight"): shape.images,
    }
    if pictures:
        names[("pixels", "waiting")] = shape.images
    if vision and shape.patches:
        names[("patches", "coordinates", "image", "window")] = shape.patches
    return {name: length for group, length in names.items() for name in group}


def to_sequence(batch: dict[str, np.ndarray]) -> Sequence:
    """Packed features (B, ...) with the packer's segment ids -> a Sequence of NumPy arrays."""
    arrays: dict[str, Any] = batch
    vision = None
    if "patches" in batch:
        document = arrays["patches_segment_ids"]  # makes the ids of images and windows unique in a row
        image: Any = np.where(document > 0, document * 1000 + arrays["image"], 0)
        window: Any = np.where(document > 0, document * 100_000 + arrays["window"], 0)
        vision = VisionInput(arrays["patches"], arrays["coordinates"], image, window)
    pictures = Pictures(arrays["pixels"], arrays["waiting"]) if "pixels" in batch else None
    names = ("tokens", "modality", "positions", "text_weight", "latents", "image_weight")
    common = {name: arrays[name] for name in names}
    return Sequence(segments=arrays["tokens_segment_ids"], vision=vision, pictures=pictures, **common)


def _off_images(document: Document, modality: np.ndarray) -> np.ndarray:
    """One entry for each position outside flow images; the packer counts them against `Shape.vlm_length`.

    Raises DocumentError if a generated image comes after another flow image: the text between them depends on an image
    that the VLM does not see in such a stage.
    """
    flow = [part for part in document if isinstance(part, Image) and part.via == "flow"]
    if any(part.generate for part in flow[1:]):
        raise DocumentError(
            "a document generates an image after another flow image, which the VLM does not see in a stage with "
            "vlm_length; set the stage's vlm_length to 0 or leave such documents to the joint stage"
        )
    return np.zeros(np.count_nonzero(modality != sequence.FLOW), np.int8)


KEYS = {"tokens": "length", "latents": "images"}  # feature of a row -> the stage's key that bounds it


class RowEncoder:
    """Turns a Document into the features of a part of a row, within the limits of `shape`."""

    def __init__(self, encoder: Encoder, shape: Shape):
        self.encoder, self.shape = encoder, shape
        self.lengths = lengths(shape, encoder.vision is not None, encoder.pictures)  # of the packed features
        if shape.vlm_length:
            self.lengths["vlm_length"] = shape.vlm_length
        # A stage may have no room for images via "vit"; then a document without any fits.
        self.room = {"patches": 0, **self.lengths} if encoder.vision else self.lengths

    def __call__(self, document: Document) -> dict[str, np.ndarray]:
        """Features by name. Raises DocumentError, and LengthError for a document that a row cannot hold."""
        features = self.encoder(document)
        if self.shape.vlm_length:
            features["vlm_length"] = _off_images(document, features["modality"])
        for name, most in self.room.items():
            if len(features[name]) > most:
                raise LengthError(
                    f"a document needs {len(features[name])} {name} but a row holds {most}; raise "
                    f"stages.NAME.{KEYS.get(name, name)}"
                )
        return {name: features[name] for name in self.lengths}


def packed(features: grain.IterDataset, encoder: RowEncoder) -> grain.IterDataset:
    """Features of documents -> Sequences of `shape.rows` rows, each with several whole documents."""
    rows = grain.experimental.FirstFitPackIterDataset(
        features,
        length_struct=encoder.lengths,
        num_packing_bins=encoder.shape.rows,
        shuffle_bins=False,
        max_sequences_per_bin=encoder.shape.documents or None,
    )
    return rows.batch(encoder.shape.rows).map(to_sequence)


def collate(features: list[dict[str, np.ndarray]], shape: Shape) -> Sequence:
    """A Sequence with one document per row, padded at the end, for sampling and evaluation. Raises DocumentError."""
    vision = any("patches" in f and len(f["patches"]) for f in features)
    batch = {}
    for name, most in lengths(shape, vision).items():
        rows = np.zeros((len(features), most, *features[0][name].shape[1:]), features[0][name].dtype)
        for row, f in zip(rows, features, strict=True):
            if len(f[name]) > most:
                raise DocumentError(f"a document needs {len(f[name])} {name} but the model was given room for {most}")
            row[: len(f[name])] = f[name]
        batch[name] = rows
    for name in ("tokens", "patches") if vision else ("tokens",):
        filled = [len(f[name]) for f in features]
        batch[f"{name}_segment_ids"] = (np.arange(batch[name].shape[1]) < np.array(filled)[:, None]).astype(np.int32)
    return to_sequence(batch)
