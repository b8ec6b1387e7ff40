"""Qwen2.5-VL: the text decoder and, over it, the whole vision-language model."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from starflow2_jax.errors import require_positive
from starflow2_jax.models import attention
from starflow2_jax.models.layers import Norm, Transformer, TransformerConfig, require_sections
from starflow2_jax.models.qwen_vision import VisionConfig, VisionTower
from starflow2_jax.parallel.sharding import constrain


@dataclass(frozen=True)
class QwenConfig:
    """Text decoder (see TransformerConfig; the layer's options are fixed here to Qwen's) and vision tower.

    Raises UserError for sizes that do not fit each other.
    """

    vocabulary: int  # V
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    rotary_theta: float = 1e6
    rotary_sections: tuple[int, ...] = (16, 24, 24)
    norm_eps: float = 1e-6
    tied_head: bool = False
    embedding_std: float = (
        0.02  # of fresh token embeddings; 1 keeps a word's identity in the hidden states of a short training
    )
    vision: VisionConfig | None = None
    dtype: str = "float32"
    remat: str = "none"  # these four: see TransformerConfig
    kernel: str = "xla"
    scan: bool = True
    unroll: int = 1

    def __post_init__(self):
        require_positive(vocabulary=self.vocabulary, kv_heads=self.kv_heads, head_dim=self.head_dim)
        require_sections("rotary_sections", self.rotary_sections, self.transformer.head)

    @property
    def transformer(self) -> TransformerConfig:
        return TransformerConfig(
            layers=self.layers, width=self.width, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            mlp_hidden=self.mlp_hidden, norm="rms", norm_eps=self.norm_eps, activation="silu", gated_mlp=True,
            qkv_bias=True, dtype=self.dtype, remat=self.remat, kernel=self.kernel,
            scan=self.scan, unroll=self.unroll,
        )  # fmt: skip


class Qwen(nn.Module):
    """Embeddings (B, S, E) in, hidden states after the final norm (B, S, E) out; the head is applied by who needs it."""

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
        """Token ids (B, S) -> embeddings (B, S, E). Devices gather the table's channels, not all rows' embeddings."""
        table = constrain(self.token_embedding.embedding.astype(self.cfg.dtype), "words", None)
        return constrain(jnp.take(table, tokens, axis=0), "batch", "sequence", "embed")

    def see(self, vision) -> jax.Array:
        """A `VisionInput` -> merged image tokens (B, P / merge^2, E)."""
        return self.vision(vision)

    def __call__(self, x, positions, mask=None, cache=None, segments=None):
        """x (B, S, E), positions (B, S, 3), and mask, cache or segments as Transformer's -> hidden states (B, S, E), cache."""
        c = self.cfg
        angles = attention.multimodal_angles(positions, c.head_dim, c.rotary_theta, c.rotary_sections)
        x, cache = self.stack(x, angles, mask, cache, segments=segments)
        return self.norm(x), cache

    def head(self) -> jax.Array:
        """The text head's matrix (V, E)."""
        return (self.token_embedding if self.cfg.tied_head else self.lm_head).embedding

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(B, S, E) -> (B, S, V) fp32."""
        return jnp.einsum("...e,ve->...v", hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int, capacity: int) -> attention.KVCache:
        return self.stack.empty_cache(batch, capacity)
