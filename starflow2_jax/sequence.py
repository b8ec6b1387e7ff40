"""The interleaved sequence: the one contract between data, model, losses and sampler.

A row holds one or more packed documents. An image is <|vision_start|>, its tokens in raster order, <|vision_end|>.
"Position t predicts t + 1" is written in this file and nowhere else.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# The modality of a position: nothing, a text token, an image token of the flow, an image token of the vision tower.
PAD, TEXT, FLOW, VIT = range(4)


@dataclass(frozen=True)
class Shape:
    """Static sizes of a batch. Except for `rows`, they are the most that a row can hold."""

    rows: int  # B
    length: int  # S
    images: int  # M, flow images in a row
    patches: int = 0  # P, patches for the vision tower in a row; 0: no vision input
    vlm_length: int = 0  # positions outside flow images, if the VLM runs over those alone; 0: no limit
    documents: int = 0  # documents in a row; 0: no limit


class Sequence(struct.PyTreeNode):
    """A batch of rows. Packers fill it with NumPy arrays, which a jitted step takes as they are.

    A row's images are in the order of their positions: the k-th FLOW position of a row reads the k-th token of
    `latents` flattened over (M, N), and the k-th VIT position reads the k-th merged token of the vision tower.
    """

    tokens: jax.Array  # (B, S) int32; at image positions the id of <|image_pad|>
    modality: jax.Array  # (B, S) int32
    segments: jax.Array  # (B, S) int32; a row's documents are numbered from 1, 0 is padding
    positions: jax.Array  # (B, S, 3) int32 multimodal rotary positions: time, row, column
    text_weight: jax.Array  # (B, S) fp32: weight of this token as a prediction
    latents: jax.Array  # (B, M, N, D) fp32, as the codec encoded the images
    image_weight: jax.Array  # (B, M) fp32: weight of the image as a prediction
    vision: "VisionInput | None" = None
    pictures: "Pictures | None" = None  # of the images whose latents the step makes

    @property
    def image_token_index(self) -> jax.Array:
        """(B, S): index of the latent token (at FLOW positions) or merged vision token (at VIT positions) to read."""

        def count(modality: int) -> jax.Array:
            here = self.modality == modality
            return jnp.where(here, jnp.cumsum(here, axis=1) - 1, 0)

        return count(FLOW) + count(VIT)

    def text_targets(self) -> tuple[jax.Array, jax.Array]:
        """Token ids (B, S) that the positions predict, and their weights (B, S).

        A weight is 0 if no text of the same document follows.
        """
        tokens = jnp.pad(self.tokens[:, 1:], ((0, 0), (0, 1)))
        weights = self.text_weight[:, 1:] * (self.segments[:, 1:] == self.segments[:, :-1])
        return tokens, jnp.pad(weights, ((0, 0), (0, 1)))

    def image_predictors(self) -> jax.Array:
        """(B, M * N): the position whose output predicts each latent token; 0 for tokens that the row does not have."""
        B, S = self.modality.shape
        _, M, N, _ = self.latents.shape
        here = self.modality == FLOW
        rows = jnp.broadcast_to(jnp.arange(B)[:, None], (B, S))
        target = jnp.where(here, self.image_token_index, M * N)  # M * N is out of bounds, which `set` drops
        before = jnp.broadcast_to(jnp.arange(S) - 1, (B, S))
        return jnp.zeros((B, M * N), jnp.int32).at[rows, target].set(before, mode="drop")


class Pictures(struct.PyTreeNode):
    """Pictures that the codec has not encoded yet. The step encodes those that wait, on the devices."""

    pixels: jax.Array  # (B, M, height, width, C) uint8: 0 is -1, 255 is 1
    waiting: jax.Array  # (B, M) bool: False where `latents` are the image's already, or there is no image


class VisionInput(struct.PyTreeNode):
    """Patches of images for the vision tower. The patches of one merged token are neighbours."""

    patches: jax.Array  # (B, P, patch width) fp32
    coordinates: jax.Array  # (B, P, 2) int32: row and column of a patch in its image
    image: jax.Array  # (B, P) int32: patches with equal ids attend to each other; 0 is padding
    window: jax.Array  # (B, P) int32: the same for the layers that attend within windows


class Step(struct.PyTreeNode):
    """Positions that decoding adds to those in a cache. Image tokens are given as u, the shallow flow's output."""

    tokens: jax.Array  # (B, S)
    modality: jax.Array  # (B, S)
    positions: jax.Array  # (B, S, 3)
    u: jax.Array  # (B, S, D), read at FLOW positions


def text_positions(start: int, count: int) -> np.ndarray:
    """Rotary positions (count, 3) of a run of `count` text tokens at offset `start`."""
    return np.repeat(start + np.arange(count), 3).reshape(count, 3)


def image_positions(start: int, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Rotary positions (h w, 3) of an image at offset `start`, and the offset after it (arXiv 2409.12191)."""
    h, w = grid
    rows, columns = np.divmod(np.arange(h * w), w)
    return start + np.stack([np.zeros_like(rows), rows, columns], axis=-1), start + max(h, w)
