"""A tiny Pretzel with everything around it: codec, tokenizer, encoder, documents, random parameters."""

from collections.abc import Iterator
from functools import cache

import grain
import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.data import digits
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.data.documents import Document, Image, Text
from starflow2_jax.data.pipeline import Encoder, RowEncoder, collate
from starflow2_jax.data.pipeline import packed as pack
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, init_params
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.sequence import Sequence, Shape

GRID, CHANNELS = (2, 3), 4  # not square, so that rows and columns cannot be mixed up
SIZE = (4, 6)  # pixels of a flow image
VISION = VisionConfig(
    layers=2, width=32, heads=2, mlp_hidden=48, out_width=32, patch=2, window=4, full_attention_layers=(1,),
    min_pixels=1,
)  # fmt: skip
FLOW = TransformerConfig(
    layers=2, width=32, heads=2, mlp_hidden=64, norm="rms_zero", activation="relu2", qk_norm="rms_zero"
)  # fmt: skip
CONFIG = PretzelConfig(
    vlm=QwenConfig(
        vocabulary=416, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, mlp_hidden=48,
        rotary_sections=(2, 3, 3), rotary_theta=1e4, vision=VISION,
    ),
    grid=GRID, channels=CHANNELS, shallow=FLOW, shallow_blocks=2, deep=FLOW, adapter_hidden=24,
    deep_rotary_sections=(2, 3, 3),
)  # fmt: skip
MODEL = Pretzel(CONFIG)
CODEC = PatchCodec(SIZE, 1, 2, (0.1, -0.2, 0.3, 0.0), (0.5, 0.6, 0.7, 0.8))


@cache
def tokenizer():
    return tokenizers.train(digits.texts(), 416)


@cache
def encoder(vision: bool = True) -> Encoder:
    return Encoder(tokenizer(), CODEC, VISION if vision else None)


@cache
def params() -> dict:
    """Random parameters, none at an initial zero, so that no zero-initialised map hides anything."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        last = path[-1].key
        center = 1.0 if last == "scale" and path[0].key == "vlm" else 0.0
        spread = {"kernel": 0.15, "embedding": 0.5}.get(last, 0.1)
        return jnp.asarray(center + spread * rng.standard_normal(x.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    with jax.ensure_compile_time_eval():  # arrays, also where a traced function is the first to ask
        return jax.tree_util.tree_map_with_path(leaf, shapes)


def with_zero_skips(tree: dict) -> dict:
    return tree | {name: jax.tree.map(jnp.zeros_like, tree[name]) for name in ("w_vlm", "w_d")}


def pixels(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (*size, 1)).astype(np.float32)


def batches(documents: list[Document], encoder: Encoder, shape: Shape) -> Iterator[Sequence]:
    """Endless packed rows of these documents, in their order."""
    source = grain.MapDataset.source(documents).map(RowEncoder(encoder, shape)).repeat()
    return iter(pack(source.to_iter_dataset(), RowEncoder(encoder, shape)))


def documents() -> list[Document]:
    """Five documents of every kind of part; two begin with what counts as a prediction."""
    return [
        [Text("draw an eight"), Image(pixels(0), generate=True)],
        [Image(pixels(1)), Text("read the digit"), Text(" nine", predict=True), Image(pixels(2), generate=True)],
        [
            Text(" seven", predict=True), Image(pixels(3, (4, 8)), via="vit"), Text(" plus"),
            Image(pixels(4, (8, 4)), via="vit"),
        ],
        [Image(pixels(5), generate=True), Text(" two", predict=True)],
        [Text("add"), Image(pixels(6, (8, 8)), via="vit"), Text(" and"), Image(pixels(7)), Text(" four", predict=True)],
    ]  # fmt: skip


def alone(document: Document, length: int = 40, images: int = 2, patches: int = 16) -> Sequence:
    """One document in one row, padded."""
    return collate([encoder()(document)], Shape(1, length, images, patches))


def packed(rows: int = 2, length: int = 64, images: int = 4, patches: int = 32) -> Sequence:
    """The documents packed by the pipeline."""
    return next(batches(documents(), encoder(), Shape(rows, length, images, patches)))


def places(batch: Sequence) -> list[tuple[int, int, np.ndarray]]:
    """(index in `documents`, row, positions in the row) of each document that a packed batch holds."""
    wanted = {tuple(encoder()(d)["tokens"]): i for i, d in enumerate(documents())}
    found = []
    for row, segments in enumerate(np.asarray(batch.segments)):
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            found.append((wanted[tuple(np.asarray(batch.tokens)[row, where])], row, where))
    return found
