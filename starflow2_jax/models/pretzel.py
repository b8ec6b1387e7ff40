"""Pretzel: the frozen VLM stream and the trainable flow stream, stacked and tied by two residual skips (arXiv 2605.08029)."""

from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax import sequence
from starflow2_jax.errors import UserError, require_positive
from starflow2_jax.models import attention
from starflow2_jax.models.attention import KVCache
from starflow2_jax.models.flow import Flow, FlowBlockConfig, alternating, gaussian
from starflow2_jax.models.jacobi import Schedule
from starflow2_jax.models.layers import ACTIVATIONS, Norm, Transformer, TransformerConfig, dense, require_sections
from starflow2_jax.models.qwen import Qwen, QwenConfig
from starflow2_jax.sequence import Sequence, Step

FROZEN = ("vlm",)  # parameter groups (top-level names) of pretrained parts; all others are trainable


@dataclass(frozen=True)
class PretzelConfig:
    """Raises UserError for streams that do not fit each other."""

    vlm: QwenConfig
    grid: tuple[int, int]  # image tokens, N = h w
    channels: int  # D
    shallow: TransformerConfig  # of one block
    shallow_blocks: int
    deep: TransformerConfig
    adapter_hidden: int
    deep_rotary_theta: float = 1e4
    deep_rotary_sections: tuple[int, ...] = (8, 12, 12)
    soft_clip: float = 0.0

    def __post_init__(self):
        h, w = self.grid
        require_positive(grid=min(h, w), channels=self.channels, shallow_blocks=self.shallow_blocks)
        require_positive(adapter_hidden=self.adapter_hidden)
        require_sections("deep_rotary_sections", self.deep_rotary_sections, self.deep.head)
        if self.vlm.vision and self.vlm.vision.out_width != self.vlm.width:
            raise UserError(
                f"vlm.vision.out_width={self.vlm.vision.out_width} must be vlm.width={self.vlm.width}, which reads it"
            )
        self.shallow_chain  # noqa: B018 - its blocks look at themselves

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def shallow_chain(self) -> tuple[FlowBlockConfig, ...]:
        block = FlowBlockConfig(self.grid, self.channels, self.shallow, final_norm=True, soft_clip=self.soft_clip)
        return alternating(block, self.shallow_blocks, flip_odd=self.shallow_blocks % 2 == 0)


@struct.dataclass
class Caches:
    """Keys and values of both streams; both have read the same positions."""

    vlm: KVCache
    deep: KVCache

    @property
    def length(self) -> jax.Array:
        return self.vlm.length

    @property
    def slots(self) -> int:
        return self.vlm.slots

    def rewind(self, length: jax.Array) -> "Caches":
        """Forget what lies beyond `length` (B,)."""
        return Caches(self.vlm.replace(length=length), self.deep.replace(length=length))


@struct.dataclass
class Output:
    """What position t says of t + 1, and, from a Sequence, what the shallow flow made of its images."""

    text: jax.Array  # (B, S, E_vlm): hidden states for the text head
    mean: jax.Array | None  # (B, S, D) fp32: of the next image token u; None without the deep stream
    scale: jax.Array | None  # (B, S, D) fp32
    caches: Caches | None = None
    u: jax.Array | None = None  # (B, M, N, D) fp32
    logdet: jax.Array | None = None  # (B, M, N, D) fp32, elementwise
    states: list[jax.Array] | None = None  # (B, M, N, D) fp32 each: what leaves the shallow flow's blocks, u the last


class Adapter(nn.Module):
    """u and its slot in the image -> the VLM's embedding space: linear, GELU, linear. [ours]"""

    cfg: PretzelConfig

    @nn.compact
    def __call__(self, u: jax.Array, slot: jax.Array) -> jax.Array:
        c = self.cfg
        x = dense(c.adapter_hidden, "in", True, c.deep.dtype)(u)
        x = x + nn.Embed(c.tokens, c.adapter_hidden, name="slot")(slot)
        return dense(c.vlm.width, "out", True, c.vlm.dtype)(ACTIVATIONS["gelu"](x))


class Pretzel(nn.Module):
    """One call trains, prefills and decodes. Parameters: `vlm` is frozen, everything else trainable."""

    cfg: PretzelConfig

    def setup(self):
        c = self.cfg
        zero = nn.initializers.zeros
        self.vlm = Qwen(c.vlm)
        self.shallow = Flow(c.shallow_chain)
        self.adapter = Adapter(c)
        self.embed_u = nn.Dense(c.deep.width, dtype=c.deep.dtype)
        self.embed_slot = nn.Embed(c.tokens, c.deep.width, dtype=c.deep.dtype)
        self.embed_y = nn.Dense(c.deep.width, dtype=c.deep.dtype)
        self.deep = Transformer(c.deep)
        self.deep_norm = Norm("rms_zero")
        self.head = nn.Dense(2 * c.channels, kernel_init=zero)
        self.w_vlm = nn.Dense(c.deep.width, use_bias=False, kernel_init=zero, dtype=c.deep.dtype)
        self.w_d = nn.Dense(c.vlm.width, use_bias=False, kernel_init=zero, dtype=c.deep.dtype)

    def __call__(
        self,
        inputs: Sequence | Step,
        caches: Caches | None = None,
        skips: bool = True,
        deep: bool = True,
        vlm_length: int = 0,
    ) -> Output:
        """Run all positions of a Sequence, or those of a Step after what `caches` hold (a Sequence fills caches too).

        `skips`: whether W_vlm and W_D are open; `deep`: whether the deep flow runs at all (a stage without it needs none).
        `vlm_length`, with closed skips only: the VLM runs over a row's positions that are no flow image and no padding,
        gathered into so many; its output is 0 at the others, and those gathered see no flow image. 0: over the whole row.
        """
        u = logdet = reads = states = None
        if isinstance(inputs, Sequence):
            reads = inputs.slot
            states, logdet = self._trace(inputs.latents)
            u = states[-1]
            u_here = _read(u.reshape(u.shape[0], -1, u.shape[-1]), reads)
        else:
            u_here = inputs.u
        is_flow = (inputs.modality == sequence.FLOW)[..., None]
        slot = self._slot_in_image(inputs)

        segments = inputs.segments if caches is None else None
        if vlm_length:
            y_vlm, vlm_cache = self._vlm_off_images(inputs, vlm_length), None
        else:
            seen = u_here if skips else jax.lax.stop_gradient(u_here)  # closed: the flow learns nothing through the VLM
            words = self._words(inputs, inputs.tokens, inputs.modality, reads)
            x = jnp.where(is_flow, self.adapter(seen, slot), words)
            y_vlm, vlm_cache = self.vlm(x, inputs.positions, None, caches.vlm if caches else None, segments)
        if not deep:
            return Output(y_vlm, None, None, None, u, logdet, states)

        image_in = self.embed_u(u_here) + self.embed_slot(slot)
        c = jnp.where(is_flow, image_in + self.w_vlm(y_vlm) if skips else image_in, self.embed_y(y_vlm))
        angles = attention.multimodal_angles(
            inputs.positions, self.cfg.deep.head, self.cfg.deep_rotary_theta, self.cfg.deep_rotary_sections
        )
        y_d, deep_cache = self.deep(c, angles, None, caches.deep if caches else None, segments=segments)
        y_d = self.deep_norm(y_d)
        mean, scale = gaussian(self.head(y_d), "softplus", self.cfg.soft_clip)
        text = y_vlm + self.w_d(y_d).astype(y_vlm.dtype) if skips else y_vlm
        grown = Caches(vlm_cache, deep_cache) if caches else None
        return Output(text, mean, scale, grown, u, logdet, states)

    def _words(self, inputs, tokens: jax.Array, modality: jax.Array, slot: jax.Array | None) -> jax.Array:
        """What the VLM is given at text and vit positions (B, S) of `inputs`: (B, S, E_vlm)."""
        x = self.vlm.embed(tokens)
        if isinstance(inputs, Sequence) and inputs.vision is not None:
            seen = _read(self.vlm.see(inputs.vision), slot)
            x = jnp.where((modality == sequence.VIT)[..., None], seen.astype(x.dtype), x)
        return x

    def _vlm_off_images(self, inputs: Sequence, length: int) -> jax.Array:
        """y_vlm (B, S, E_vlm), run over the first `length` positions of a row that are text or vit; 0 at all others."""
        here = (inputs.modality == sequence.TEXT) | (inputs.modality == sequence.VIT)
        at = jnp.argsort(~here, axis=1, stable=True)[:, :length]
        tokens, modality, slot, segments = (
            jnp.take_along_axis(a, at, axis=1) for a in (inputs.tokens, inputs.modality, inputs.slot, inputs.segments)
        )
        segments = jnp.where(jnp.take_along_axis(here, at, axis=1), segments, 0)
        x = self._words(inputs, tokens, modality, slot)
        y, _ = self.vlm(x, _read(inputs.positions, at), segments=segments)
        return jnp.where(here[..., None], _read(y, jnp.cumsum(here, axis=1) - 1), 0)

    def encode(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The shallow flow: latents (B, M, N, D) -> u and its elementwise log-determinant, both (B, M, N, D) fp32."""
        states, logdet = self._trace(latents)
        return states[-1], logdet

    def _trace(self, latents: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Latents (B, M, N, D) -> what leaves each block of the shallow flow, and its log-determinant, (B, M, N, D) each."""
        B, M, N, D = latents.shape
        states, logdets = self.shallow.trace(latents.reshape(B * M, N, D))
        return [h.reshape(latents.shape) for h in states], sum(logdets).reshape(latents.shape)

    def decode(self, u: jax.Array, schedule: Schedule | None = None) -> jax.Array:
        """The shallow flow's inverse: u (B, N, D) -> latents (B, N, D), as `schedule` says (None: token by token)."""
        return self.shallow.inverse(u, schedule=schedule)

    def text_logits(self, text: jax.Array) -> jax.Array:
        """Hidden states (B, S, E_vlm) -> logits (B, S, V) fp32."""
        return self.vlm.logits(text)

    def text_head(self) -> jax.Array:
        """The text head's matrix (V, E_vlm)."""
        return self.vlm.head()

    def empty_caches(self, batch: int, slots: int) -> Caches:
        return Caches(self.vlm.empty_cache(batch, slots), self.deep.empty_cache(batch, slots))

    def _slot_in_image(self, inputs) -> jax.Array:
        """(B, S): which of its image's N tokens a FLOW position is: rows and columns count from the image's time."""
        time, row, column = jnp.moveaxis(inputs.positions, -1, 0)
        return jnp.where(inputs.modality == sequence.FLOW, (row - time) * self.cfg.grid[1] + column - time, 0)


def _read(source: jax.Array, slot: jax.Array) -> jax.Array:
    """source (B, T, D), slot (B, S) -> (B, S, D)."""
    return jnp.take_along_axis(source, slot[..., None], axis=1, mode="clip")


def portable(cfg: PretzelConfig) -> PretzelConfig:
    """The same model, its attention computed by the kernel that runs everywhere."""
    streams = {name: replace(getattr(cfg, name), kernel="xla") for name in ("vlm", "shallow", "deep")}
    return replace(cfg, **streams)


def for_sampling(cfg: PretzelConfig) -> PretzelConfig:
    """The same model, portable, each layer with parameters of its own (`separate_layers`): a step copies none of them."""
    cfg = portable(cfg)
    streams = {name: replace(getattr(cfg, name), scan=False) for name in ("vlm", "shallow", "deep")}
    vision = cfg.vlm.vision and replace(cfg.vlm.vision, scan=False)
    return replace(cfg, **streams | {"vlm": replace(streams["vlm"], vision=vision)})


def split(params: dict) -> tuple[dict, dict]:
    """The parameter groups of a Pretzel -> (frozen, trainable)."""
    frozen = {k: v for k, v in params.items() if k in FROZEN}
    return frozen, {k: v for k, v in params.items() if k not in FROZEN}


@partial(jax.jit, static_argnums=0)  # traced once for each model: shapes are asked for often
def init_params(model: Pretzel, key: jax.Array) -> dict:
    """All parameter groups, fp32. Under `jax.eval_shape` their shapes, without memory."""
    model = Pretzel(portable(model.cfg))  # the example is too short a row for other kernels
    c = model.cfg
    vision = None
    if c.vlm.vision:
        patches = c.vlm.vision.merge**2
        vision = sequence.VisionInput(
            patches=jnp.zeros((1, patches, c.vlm.vision.patch_width)),
            coordinates=jnp.zeros((1, patches, 2), jnp.int32),
            image=jnp.zeros((1, patches), jnp.int32),
            window=jnp.zeros((1, patches), jnp.int32),
        )
    ids = jnp.zeros((1, 1), jnp.int32)
    latents = jnp.zeros((1, 1, c.tokens, c.channels))
    example = Sequence(
        ids, ids, ids, jnp.zeros((1, 1, 3), jnp.int32), jnp.zeros((1, 1)), latents, jnp.zeros((1, 1)), vision
    )

    def every_part(m: Pretzel):
        m.text_logits(m(example).text)

    return model.init(key, method=every_part)["params"]
