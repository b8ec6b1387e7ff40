"""Qwen2.5-VL: the text decoder and, over it, the whole vision-language model."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from starflow2_jax.fields import check, option
from starflow2_jax.models import attention
from starflow2_jax.models.kernels import PLATFORMS
from starflow2_jax.models.layers import Computation, Norm, Transformer, TransformerConfig, require_sections
from starflow2_jax.models.qwen_vision import VisionConfig, VisionTower
from starflow2_jax.models.vlm_inputs import VlmInputs
from starflow2_jax.parallel.sharding import constrain
from starflow2_jax.sequence import VisionInput


@dataclass(frozen=True)
class QwenConfig(Computation):
    """Sizes of the text decoder, and its vision tower; the options of a layer that are not fields here are Qwen's.

    Raises UserError for sizes that do not fit each other.
    """

    vocabulary: int = option("tokens (V)", least=1)
    layers: int = option("layers (L)", least=1, most=4096)
    width: int = option("channels of the residual stream (E)", least=1)
    heads: int = option("attention heads (H)", least=1)
    kv_heads: int = option("key and value heads (J)", least=1)
    head_dim: int = option("channels of a head (K)", least=1)
    mlp_hidden: int = option("hidden channels of the MLP (F)", least=1)
    rotary_theta: float = option("base of the rotary frequencies", 1e6, above=0)
    rotary_sections: tuple[int, ...] = option("rotary pairs for time, row and column", (16, 24, 24), least=0)
    norm_eps: float = option("added to the mean square before its root", 1e-6, above=0)
    tied_head: bool = option("the text head is the token embedding", False)
    embedding_std: float = option(
        "deviation of fresh token embeddings; 1 keeps a word's identity through a short training", 0.02, least=0
    )
    vision: VisionConfig | None = option("the vision tower; None: the VLM sees no image by itself", None)
    kernel: str = option(
        "attention kernel over whole rows; splash is for TPUs, cudnn for GPUs", "xla", choices=PLATFORMS
    )
    scan: bool = option("the layers' parameters are stacked and scanned over; False: each has its own", True)
    kind: str = option("the kind of vision-language model: a key of models/vlm.py's table", "qwen2_5_vl")

    def __post_init__(self):
        check(self)
        require_sections("rotary_sections", self.rotary_sections, self.transformer.head)

    @property
    def transformer(self) -> TransformerConfig:
        """The text decoder's layers."""
        return TransformerConfig.of(self, norm="rms", activation="silu", gated_mlp=True, qkv_bias=True)


class Qwen(nn.Module):
    """A Vlm (vlm.py): token ids and images in, hidden states (B, S, E) after the final norm out."""

    cfg: QwenConfig

    def setup(self):
        c = self.cfg
        init = nn.initializers.normal(0.02)
        fresh = nn.initializers.normal(c.embedding_std)
        self.token_embedding = nn.Embed(c.vocabulary, c.width, dtype=c.dtype, embedding_init=fresh)
        self.stack = Transformer(c.transformer)
        self.norm = Norm("rms", c.norm_eps)
        if not c.tied_head:
            self.lm_head = nn.Embed(c.vocabulary, c.width, dtype=c.dtype, embedding_init=init)
        if c.vision:
            self.vision = VisionTower(c.vision)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids (B, S) -> embeddings (B, S, E).

        The table's channels are gathered, its words stay on their shards: that moves less than the rows' embeddings.
        """
        table = constrain(self.token_embedding.embedding.astype(self.cfg.dtype), "words", None)
        return constrain(jnp.take(table, tokens, axis=0), "batch", "sequence", "embed")

    def see(self, vision: VisionInput) -> jax.Array:
        """Images -> merged image tokens (B, P / merge^2, E)."""
        return self.vision(vision)

    def __call__(
        self, inputs: VlmInputs, cache: attention.KVCache | None = None
    ) -> tuple[jax.Array, attention.KVCache | None]:
        """Hidden states (B, S, E) after the final norm, and the cache grown by S positions."""
        merged = None if inputs.vision is None else self.see(inputs.vision)
        x = inputs.embeddings(self.embed(inputs.tokens), merged)
        return self.run(x, inputs.positions, cache=cache, segments=inputs.segments)

    def run(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None = None,
        cache: attention.KVCache | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, attention.KVCache | None]:
        """The text decoder: x (B, S, E), positions (B, S, 3) -> hidden states (B, S, E), cache.

        mask, cache and segments are the Transformer's.
        """
        c = self.cfg
        angles = attention.multimodal_angles(positions, c.head_dim, c.rotary_theta, c.rotary_sections)
        x, cache = self.stack(x, angles, mask, cache, segments=segments)
        return self.norm(x), cache

    def head(self) -> jax.Array:
        """The text head's matrix (V, E)."""
        return (self.token_embedding if self.cfg.tied_head else self.lm_head).embedding

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., E) -> logits (..., V) fp32."""
        return jnp.einsum("...e,ve->...v", hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int, capacity: int) -> attention.KVCache:
        """A cache of `batch` rows with room for `capacity` positions each."""
        return self.stack.empty_cache(batch, capacity)
