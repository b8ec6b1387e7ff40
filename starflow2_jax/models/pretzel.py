"""Pretzel: the frozen VLM stream and the trainable flow stream, stacked and tied by two skips (arXiv 2605.08029)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax import sequence
from starflow2_jax.errors import UserError
from starflow2_jax.fields import Variant, check, option
from starflow2_jax.models import attention
from starflow2_jax.models.attention import KVCache
from starflow2_jax.models.flow import Flow, FlowBlockConfig, alternating, gaussian
from starflow2_jax.models.jacobi import Schedule
from starflow2_jax.models.layers import ACTIVATIONS, Norm, Transformer, TransformerConfig, dense, require_sections
from starflow2_jax.models.vlm import VlmConfig, config_class, config_classes, example_vision, make_vlm
from starflow2_jax.models.vlm_inputs import VlmInputs, gather_positions
from starflow2_jax.sequence import Sequence, Step

FROZEN = ("vlm",)  # the parameter groups (top-level names) of pretrained parts; all others are trainable


@dataclass(frozen=True)
class PretzelConfig:
    """Sizes of both streams and of what ties them. Raises UserError for streams that do not fit each other."""

    vlm: VlmConfig = option(
        "the vision-language model, frozen once it is pretrained", variant=Variant("kind", config_class, config_classes)
    )
    grid: tuple[int, int] = option("rows and columns of an image's tokens (N = h w)", least=1)
    channels: int = option("channels of an image token (D)", least=1)
    shallow: TransformerConfig = option("one block of the shallow flow, over the tokens of one image")
    shallow_blocks: int = option(
        "blocks of the shallow flow; 0: the deep flow predicts the latents themselves", least=0, most=256
    )
    deep: TransformerConfig = option("the deep flow, over the whole row of text and images")
    adapter_hidden: int = option("hidden channels of the adapter from image tokens into the VLM", least=1)
    deep_rotary_theta: float = option("base of the deep flow's rotary frequencies", 1e4, above=0)
    deep_rotary_sections: tuple[int, ...] = option(
        "rotary pairs of the deep flow for time, row and column; half of a head's channels", (8, 12, 12), least=0
    )
    soft_clip: float = option("bound c of c tanh(x / c) on the flows' outputs; 0: none", 0.0, least=0)

    def __post_init__(self):
        check(self)
        require_sections("deep_rotary_sections", self.deep_rotary_sections, self.deep.head)
        if self.vlm.vision and self.vlm.vision.out_width != self.vlm.width:
            raise UserError(
                f"vlm.vision.out_width={self.vlm.vision.out_width} must be vlm.width={self.vlm.width}, which reads it"
            )
        self.shallow_chain  # noqa: B018 - builds the blocks' configs, which check themselves

    @property
    def tokens(self) -> int:
        """Tokens of an image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def shallow_chain(self) -> tuple[FlowBlockConfig, ...]:
        """The blocks of the shallow flow, the first nearest the data."""
        block = FlowBlockConfig(self.grid, self.channels, self.shallow, final_norm=True, soft_clip=self.soft_clip)
        return alternating(block, self.shallow_blocks, flip_odd=self.shallow_blocks % 2 == 0)


class Caches(struct.PyTreeNode):
    """Keys and values of both streams, which have always read the same positions."""

    vlm: KVCache
    deep: KVCache

    @property
    def length(self) -> jax.Array:
        """(B,) int32: positions that each row has read."""
        return self.vlm.length

    @property
    def capacity(self) -> int:
        """Positions that a row has room for."""
        return self.vlm.capacity

    def rewind(self, length: jax.Array) -> "Caches":
        """Forget the positions from `length` (B,) on."""
        return Caches(self.vlm.replace(length=length), self.deep.replace(length=length))


class Output(struct.PyTreeNode):
    """What each position predicts of the next one, and, for a Sequence, the shallow flow's images.

    A field is None if the call did not compute it; type checkers see Any, because they cannot know.
    """

    text: jax.Array  # (B, S, E_vlm): hidden states for the text head
    mean: Any  # (B, S, D) fp32: mean of the next image token u; None if the deep flow did not run
    scale: Any  # (B, S, D) fp32: its scale, likewise
    caches: Any = None  # Caches that hold the new positions, too; None without caches
    u: Any = None  # (B, M, N, D) fp32; it and the next two: None for a Step
    logdet: Any = None  # (B, M, N, D) fp32: the shallow flow's log-determinant, elementwise
    states: Any = None  # a list of (B, M, N, D) fp32: outputs of the shallow flow's blocks, u is the last


class Adapter(nn.Module):
    """The visual adapter: u and its place in the image -> the VLM's embedding space, by linear, GELU, linear. [ours]"""

    cfg: PretzelConfig

    @nn.compact
    def __call__(self, u: jax.Array, slot: jax.Array) -> jax.Array:
        """u (B, S, D), slot (B, S): which of its image's N tokens each is -> (B, S, E_vlm)."""
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
        self.vlm = make_vlm(c.vlm)
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
        """Run all positions of a Sequence, or of a Step. With `caches` they come after the positions in the caches.

        skips: whether the skips W_vlm and W_D are open.
        deep: whether the deep flow runs; without it there is no Gaussian of the next image token.
        vlm_length: only with closed skips. The VLM runs over the text and vit positions of each row alone, gathered
            into rows of this length, so they see no flow image; its output is 0 elsewhere. 0: it runs over whole rows.
        """
        u = logdet = reads = states = None
        if isinstance(inputs, Sequence):
            reads = inputs.image_token_index
            states, logdet = self.trace(inputs.latents)
            u = states[-1]
            u_here = gather_positions(u.reshape(u.shape[0], -1, u.shape[-1]), reads)
        else:
            u_here = inputs.u
        is_flow = (inputs.modality == sequence.FLOW)[..., None]
        slot = self._slot_in_image(inputs)

        segments = inputs.segments if isinstance(inputs, Sequence) and caches is None else None
        if vlm_length:
            assert isinstance(inputs, Sequence), "vlm_length is for a Sequence"
            y_vlm, vlm_cache = self._vlm_off_images(inputs, vlm_length), None
        else:
            seen = u_here if skips else jax.lax.stop_gradient(u_here)  # closed: the flow gets no gradient from the VLM
            vision = inputs.vision if isinstance(inputs, Sequence) else None
            given = VlmInputs(
                inputs.tokens, inputs.modality, inputs.positions, segments, self.adapter(seen, slot), vision, reads
            )
            y_vlm, vlm_cache = self.vlm(given, caches.vlm if caches else None)
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
        grown = Caches(vlm_cache, deep_cache) if vlm_cache and deep_cache else None
        return Output(text, mean, scale, grown, u, logdet, states)

    def _vlm_off_images(self, inputs: Sequence, length: int) -> jax.Array:
        """The VLM run over the first `length` text and vit positions of each row: (B, S, E_vlm), 0 at all others."""
        here = (inputs.modality == sequence.TEXT) | (inputs.modality == sequence.VIT)
        at = jnp.argsort(~here, axis=1, stable=True)[:, :length]
        tokens, modality, reads, segments = (
            jnp.take_along_axis(a, at, axis=1)
            for a in (inputs.tokens, inputs.modality, inputs.image_token_index, inputs.segments)
        )
        segments = jnp.where(jnp.take_along_axis(here, at, axis=1), segments, 0)
        positions = gather_positions(inputs.positions, at)
        y, _ = self.vlm(VlmInputs(tokens, modality, positions, segments, None, inputs.vision, reads))
        return jnp.where(here[..., None], gather_positions(y, jnp.cumsum(here, axis=1) - 1), 0)

    def trace(self, latents: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Latents (B, M, N, D) -> outputs of the shallow flow's blocks and its log-determinant, (B, M, N, D) each."""
        B, M, N, D = latents.shape
        states, logdets = self.shallow.trace(latents.reshape(B * M, N, D))
        logdet = sum(logdets, jnp.zeros((B * M, N, D), jnp.float32))
        return [h.reshape(latents.shape) for h in states] or [latents], logdet.reshape(latents.shape)

    def decode(self, u: jax.Array, schedule: Schedule | None = None) -> jax.Array:
        """The shallow flow's inverse: u (B, N, D) -> latents (B, N, D), solved by `schedule` (None: token by token)."""
        return self.shallow.inverse(u, schedule=schedule)

    def text_logits(self, text: jax.Array) -> jax.Array:
        """Hidden states (B, S, E_vlm) -> logits (B, S, V) fp32."""
        return self.vlm.logits(text)

    def text_head(self) -> jax.Array:
        """The text head's matrix (V, E_vlm)."""
        return self.vlm.head()

    def empty_caches(self, batch: int, capacity: int) -> Caches:
        """Caches of `batch` rows with room for `capacity` positions each."""
        return Caches(self.vlm.empty_cache(batch, capacity), self.deep.empty_cache(batch, capacity))

    def _slot_in_image(self, inputs: Sequence | Step) -> jax.Array:
        """(B, S): which of its image's N tokens a FLOW position is; its row and column count from the image's time."""
        time, row, column = jnp.moveaxis(inputs.positions, -1, 0)
        return jnp.where(inputs.modality == sequence.FLOW, (row - time) * self.cfg.grid[1] + column - time, 0)


def apply(model: nn.Module, params: dict, *inputs: Any, **options: Any) -> Any:
    """`model.apply` with these parameters. The type of its result depends on `method`, so type checkers see Any."""
    return model.apply({"params": params}, *inputs, **options)


def portable(cfg: PretzelConfig) -> PretzelConfig:
    """The same model with attention computed by the kernel "xla", which runs on every platform."""
    streams = {name: replace(getattr(cfg, name), kernel="xla") for name in ("vlm", "shallow", "deep")}
    return replace(cfg, **streams)


def for_sampling(cfg: PretzelConfig) -> PretzelConfig:
    """The same model, portable, each layer with parameters of its own (`separate_layers`), so decoding copies none."""
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
    """All parameter groups, fp32. Under `jax.eval_shape`: their shapes, without memory."""
    model = Pretzel(portable(model.cfg))  # other kernels refuse a row as short as the example
    c = model.cfg
    vision = example_vision(c.vlm.vision)
    ids = jnp.zeros((1, 1), jnp.int32)
    latents = jnp.zeros((1, 1, c.tokens, c.channels))
    example = Sequence(
        ids, ids, ids, jnp.zeros((1, 1, 3), jnp.int32), jnp.zeros((1, 1)), latents, jnp.zeros((1, 1)), vision
    )

    def every_part(m: Pretzel):
        m.text_logits(m(example).text)

    return dict(model.init(key, method=every_part))["params"]
