"""The contract of a vision-language model, and the table of the known ones.

Pretzel and everything around it know a VLM through the protocols of this file alone. A new one is a config class, a
Flax module and a row of VLMS; docs/extending.md walks through it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.errors import require_one_of
from starflow2_jax.models.attention import KVCache
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.qwen import Qwen, QwenConfig
from starflow2_jax.models.vlm_inputs import VlmInputs
from starflow2_jax.sequence import VisionInput


class VisionConfig(Protocol):
    """A vision tower: a frozen dataclass with (at least) these fields and methods."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def out_width(self) -> int:
        """Channels of the tokens that the text decoder reads; equal to the VLM's width."""
        ...

    @property
    def merge(self) -> int:
        """Side of the square of patches that become one token."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the pixels that it takes."""
        ...

    @property
    def dtype(self) -> str:
        """Type of its matrix products."""
        ...

    @property
    def scan(self) -> bool:
        """See TransformerConfig."""
        ...

    @property
    def patch_width(self) -> int:
        """Numbers in one patch."""
        ...

    @property
    def transformer(self) -> TransformerConfig:
        """Its stack of layers, for counting FLOP."""
        ...

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the matrix that embeds a patch."""
        ...

    @property
    def merger_parameters(self) -> int:
        """Parameters of the matrices that make one merged token out of merge^2 patches."""
        ...

    def visible_patches(self, patches: int) -> float:
        """How many of an image's `patches` one patch attends to, averaged over the layers."""
        ...

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of an image in pixels -> the size that the tower sees. Raises ValueError to refuse it."""
        ...

    def merged_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels, before resizing -> grid of merged tokens. Raises ValueError as `resized` does."""
        ...

    def bounded(self, least: int | None = None, most: int | None = None) -> Self:
        """The same tower with other limits of an image's pixels; None keeps a limit. A tower that has only one size
        returns itself.
        """
        ...

    def preprocess(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Pixels (height, width, C) in [-1, 1] -> the fields of a VisionInput for one image.

        "patches" (P, patch width) fp32, "coordinates" (P, 2) int32, "window" (P,) int32 counting from 0 (all 0 if the
        tower has no windows). The patches of one merged token are neighbours.
        """
        ...


class VlmConfig(Protocol):
    """A whole VLM: a frozen dataclass with (at least) these fields, JSON values or dataclasses of JSON values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str:
        """Its key in VLMS."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of tokens, V."""
        ...

    @property
    def width(self) -> int:
        """Channels of the residual stream, E."""
        ...

    @property
    def vision(self) -> VisionConfig | None:
        """Its vision tower; None if it sees no images."""
        ...

    @property
    def dtype(self) -> str:
        """Data type of its matrix products and caches."""
        ...

    @property
    def remat(self) -> str:
        """See TransformerConfig, like the next two."""
        ...

    @property
    def kernel(self) -> str:
        """The attention kernel."""
        ...

    @property
    def scan(self) -> bool:
        """Whether the layers' parameters are stacked."""
        ...

    @property
    def transformer(self) -> TransformerConfig:
        """The text decoder's layers, for counting FLOP."""
        ...


class Vlm(Protocol):
    """A Flax module, made from its config alone. Its parameters are Pretzel's group `vlm`."""

    cfg: Any  # a VlmConfig

    def __call__(self, inputs: VlmInputs, cache: KVCache | None = None) -> tuple[jax.Array, KVCache | None]:
        """Hidden states (B, S, E) after the final norm, and the cache grown by S positions.

        A position sees those before it: in its document (`inputs.segments`), or in the cache.
        """
        ...

    def head(self) -> jax.Array:
        """The text head's matrix (V, E)."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., E) -> (..., V) fp32: their products with the rows of `head`, nothing else.

        Training does not call this method; it multiplies by the matrix in chunks.
        """
        ...

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of `batch` rows with room for `capacity` positions each."""
        ...


@dataclass(frozen=True)
class VlmKind:
    """A row of VLMS."""

    config: type  # a frozen dataclass that is a VlmConfig
    module: type[nn.Module]  # a Vlm


VLMS: dict[str, VlmKind] = {"qwen2_5_vl": VlmKind(QwenConfig, Qwen)}
DEFAULT_KIND = "qwen2_5_vl"  # of a config that names none


def config_classes() -> list[type]:
    """The config dataclasses of all kinds."""
    return [row.config for row in VLMS.values()]


def config_class(kind: str | None = None) -> type:
    """The config dataclass of a kind; None: of DEFAULT_KIND. Raises UserError for an unknown kind."""
    kind = DEFAULT_KIND if kind is None else kind
    require_one_of("model.vlm.kind", kind, VLMS)
    return VLMS[kind].config


def make_vlm(cfg: VlmConfig) -> Any:
    """The Flax module of a config, a Vlm. Raises UserError for an unknown kind."""
    require_one_of("vlm.kind", cfg.kind, VLMS)
    return VLMS[cfg.kind].module(cfg)


def example_vision(cfg: VisionConfig | None) -> VisionInput | None:
    """The smallest VisionInput, one merged token's patches (1, merge^2, patch width), all 0; None without a tower."""
    if cfg is None:
        return None
    index = jnp.zeros((1, cfg.merge**2), jnp.int32)
    patches = jnp.zeros((1, cfg.merge**2, cfg.patch_width))
    return VisionInput(patches, jnp.stack([index, index], -1), image=index, window=index)


def abstract_params(cfg: VlmConfig) -> dict:
    """Shapes and types of Pretzel's group `vlm`: {"vlm": {...}}."""
    module, ids = make_vlm(cfg), jnp.zeros((1, 1), jnp.int32)
    example = VlmInputs(
        ids, ids, jnp.zeros((1, 1, 3), jnp.int32), ids, vision=example_vision(cfg.vision), vision_index=ids
    )
    every_part = partial(module.init, method=lambda m: m.logits(m(example)[0]))
    return {"vlm": jax.eval_shape(every_part, jax.random.key(0))["params"]}
