"""What Pretzel hands to a vision-language model."""

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax import sequence
from starflow2_jax.sequence import VisionInput


class VlmInputs(struct.PyTreeNode):
    """The positions that a VLM runs over, with everything that any of its layers may need.

    With a cache these are the positions after those in it, and `segments` is None.
    """

    tokens: jax.Array  # (B, S) int32
    modality: jax.Array  # (B, S) int32: PAD, TEXT, FLOW or VIT of sequence.py
    positions: jax.Array  # (B, S, 3) int32: time, row, column
    segments: jax.Array | None = None  # (B, S) int32; documents of a row count from 1, 0 is padding
    flow: jax.Array | None = None  # (B, S, E): the embeddings at FLOW positions; None if there are none
    vision: VisionInput | None = None  # the images that the vision tower sees; None if there are none
    vision_index: jax.Array | None = None  # (B, S) int32: which merged token of the vision tower a VIT position reads

    def at_vit(self, merged: jax.Array) -> jax.Array:
        """Merged tokens of the vision tower (B, T, E) -> the one that each position reads (B, S, E).

        Only VIT positions mean anything in the result.
        """
        assert self.vision_index is not None, "VIT positions need vision_index"
        return gather_positions(merged, self.vision_index)

    def embeddings(self, words: jax.Array, merged: jax.Array | None = None) -> jax.Array:
        """The input of the first layer (B, S, E).

        words (B, S, E) are the token embeddings, merged (B, T, E) the vision tower's tokens, placed at VIT positions.
        `self.flow` is placed at FLOW positions.
        """
        if merged is not None:
            words = jnp.where(
                (self.modality == sequence.VIT)[..., None], self.at_vit(merged).astype(words.dtype), words
            )
        if self.flow is not None:
            words = jnp.where((self.modality == sequence.FLOW)[..., None], self.flow, words)
        return words


def gather_positions(source: jax.Array, index: jax.Array) -> jax.Array:
    """source (B, T, D), index (B, S) -> (B, S, D): row b of the result holds source[b, index[b]]."""
    return jnp.take_along_axis(source, index[..., None], axis=1, mode="clip")
