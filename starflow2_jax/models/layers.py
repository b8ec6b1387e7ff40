"""The pre-norm Transformer that every stream is built from, and its parts."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from starflow2_jax.errors import UserError
from starflow2_jax.fields import check, option
from starflow2_jax.models import attention
from starflow2_jax.models.attention import KVCache
from starflow2_jax.models.kernels import PLATFORMS, SAVED, attend_packed
from starflow2_jax.parallel.sharding import constrain, constrain_parameter

LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer, (B, J, C, K) each
LAYER_INPUT = "layer_input"  # its name for remat policies
_POLICIES = jax.checkpoint_policies
# Which values of a layer are saved for the backward pass; it computes the others again.
REMAT = {
    "none": None,  # all of them
    "full": _POLICIES.nothing_saveable,  # the layer's input alone
    # The layer's input, the outputs of matrix products with weights, and what splash attention's backward pass needs.
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(SAVED)
    ),
    # The layer's input alone, in the host's memory.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def widened(x: jax.Array) -> jax.Array:
    """x in fp32; float64 stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, in fp32 at least, by erf as in PyTorch; a TPU computes erf faster than jax.nn.gelu's erfc."""
    wide = widened(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

NORMS = ("layer", "rms", "rms_zero")  # (x - mean) w + b, x w, x (1 + w), each x divided by its root mean square
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a network computes its layers, whatever their sizes: options that every network's config has."""

    dtype: str = option(
        "type of matrix products; norms, softmax and rotations are always fp32", "float32", choices=DTYPES
    )
    remat: str = option("what of a layer the backward pass computes again", "none", choices=REMAT)
    unroll: int = option("layers a step of the scan; all of them is fastest on CPU", 1, least=1)


@dataclass(frozen=True)
class TransformerConfig(Computation):
    """A stack of identical pre-norm layers: x + attention(norm(x)), then x + mlp(norm(x)).

    Raises UserError for unknown values, or sizes that do not fit each other.
    """

    layers: int = option("layers (L)", least=1, most=4096)
    width: int = option("channels of the residual stream (E)", least=1)
    heads: int = option("attention heads (H)", least=1)
    mlp_hidden: int = option("hidden channels of the MLP (F)", least=1)
    kv_heads: int = option("key and value heads (J); 0: as many as heads", 0, least=0)
    head_dim: int = option("channels of a head (K); 0: width / heads", 0, least=0)
    norm: str = option("layer norm; rms scales by w, rms_zero by 1 + w", "rms", choices=NORMS)
    norm_eps: float = option("added to the mean square before its root", 1e-6, above=0)
    activation: str = option("activation of the MLP", "gelu", choices=ACTIVATIONS)
    gated_mlp: bool = option("the MLP is act(gate) * up", False)
    qkv_bias: bool = option("queries, keys and values have a bias", False)
    out_bias: bool = option("the attention's output has a bias", False)
    mlp_bias: bool = option("the MLP's linear maps have a bias", False)
    qk_norm: str = option(
        "norm of each head of queries and keys, before the rotation", "none", choices=("none", *NORMS)
    )
    qk_norm_eps: float = option("added to the mean square of a head before its root", 1e-6, above=0)
    post_norm: bool = option("RMS norm after attention and after the MLP", False)
    dropout: float = option(
        "share of what a branch adds to the stream that is dropped in training", 0.0, least=0, below=1
    )
    layer_scale: bool = option("a learned factor per channel on what attention and the MLP add", False)
    kernel: str = option(
        "attention kernel over whole rows; splash is for TPUs, cudnn for GPUs", "xla", choices=PLATFORMS
    )
    scan: bool = option("the layers' parameters are stacked and scanned over; False: each has its own", True)

    def __post_init__(self):
        check(self)
        if not self.head_dim and self.width % self.heads:
            raise UserError(f"heads={self.heads} must divide width={self.width}; else set head_dim")
        if self.heads % self.kv:
            raise UserError(f"kv_heads={self.kv} must divide heads={self.heads}")

    @classmethod
    def of(cls, config: Any, **others: Any) -> Self:
        """The fields that the dataclass `config` has too, by name, and `others`. The rest have their defaults."""
        names = {field.name for field in fields(cls)} & {field.name for field in fields(config)}
        return cls(**{name: getattr(config, name) for name in names}, **others)

    @property
    def kv(self) -> int:
        """Key/value heads, J."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Channels of a head, K."""
        return self.head_dim or self.width // self.heads


def require_sections(name: str, sections: tuple[int, ...], head: int) -> None:
    """Raises UserError unless the rotary sections (time, row, column) sum to the pairs of a head's channels."""
    if len(sections) != 3 or 2 * sum(sections) != head:
        raise UserError(f"{name}={tuple(sections)} must be three numbers that sum to half of a head's {head} channels")


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in fp32 at least, returned in x's dtype."""

    kind: str = "rms"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., E) -> the same shape."""
        wide = widened(x)
        E = x.shape[-1]
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, -1, keepdims=True)
        y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        if self.kind == "rms_zero":
            y = y * (1 + self.param("scale", nn.initializers.zeros, (E,)))
        else:
            y = y * self.param("scale", nn.initializers.ones, (E,))
        if self.kind == "layer":
            y = y + self.param("bias", nn.initializers.zeros, (E,))
        return y.astype(x.dtype)


def _cast_on_shards(
    path: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Any = None, inexact: bool = True
) -> Any:
    """Promote types as Flax does, then pin the kernel to its shards, so that devices exchange the smaller type."""
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype, inexact=inexact)
    return x, constrain_parameter(kernel, path), bias


def dense(
    features: int | tuple[int, ...],
    name: str,
    bias: bool,
    dtype: str,
    axis: int | tuple[int, ...] = -1,
    gain: float = 1.0,
    part: str = "",
) -> nn.DenseGeneral:
    """A linear map, its kernel drawn with variance `gain`^2 / fan-in.

    `part` is the name of the module around it, by which the sharding rules know the kernel.
    """
    init = nn.initializers.variance_scaling(gain**2, "fan_in", "normal") if gain else nn.initializers.zeros
    cast: Any = partial(_cast_on_shards, f"{part}/{name}/kernel")
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=dtype, kernel_init=init, promote_dtype=cast, name=name
    )


class Attention(nn.Module):
    """Multi-head self-attention with grouped key/value heads, causal unless a mask is given."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | None,
        mask: jax.Array | None,
        segments: jax.Array | None,
        stored: LayerCache | None,
        start: jax.Array | None,
        temperature: float | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x (B, S, E) -> y (B, S, E), stored. Arguments as the Transformer's, of one layer.

        `stored` is this layer's keys and values (B, J, C, K), `start` (B,) their filled lengths; both are None
        without a cache, and then `temperature` is not used.
        """
        c = self.cfg
        linear = partial(dense, dtype=c.dtype, part="attention")
        q = linear((c.heads, c.head), "query", c.qkv_bias)(x)
        k = linear((c.kv, c.head), "key", c.qkv_bias)(x)
        v = linear((c.kv, c.head), "value", c.qkv_bias)(x)
        if c.qk_norm != "none":
            q = Norm(c.qk_norm, c.qk_norm_eps, name="query_norm")(q)
            k = Norm(c.qk_norm, c.qk_norm_eps, name="key_norm")(k)
        if angles is not None:
            q, k = attention.rotate(q, angles), attention.rotate(k, angles)
        q = constrain(q, "batch", "sequence", "heads", None)
        if stored is not None:
            assert start is not None and mask is not None and temperature is not None, "a call with a cache has these"
            keys, values = stored
            stored = attention.write_cache(keys, k, start), attention.write_cache(values, v, start)
            k, v = (a.astype(q.dtype) for a in stored)
            out = attention.attend_cached(q, k, v, mask, temperature)
        elif mask is None:
            out = attend_packed(q, k, v, segments, c.kernel)
        else:
            out = attention.attend(q, k, v, mask)
        out = linear(c.width, "out", c.out_bias, axis=(-2, -1), gain=(2 * c.layers) ** -0.5)(out)
        return out, stored


class MLP(nn.Module):
    """Linear, activation, linear; or the gated form down(act(gate(x)) * up(x))."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, S, E) -> (B, S, E)."""
        c = self.cfg
        act = ACTIVATIONS[c.activation]
        linear = partial(dense, bias=c.mlp_bias, dtype=c.dtype, part="mlp")
        up = linear(c.mlp_hidden, "up")(x)
        hidden = act(linear(c.mlp_hidden, "gate")(x)) * up if c.gated_mlp else act(up)
        hidden = constrain(hidden, "batch", "sequence", "hidden")
        return linear(c.width, "down", gain=(2 * c.layers) ** -0.5)(hidden)


class Layer(nn.Module):
    """One layer of a Transformer."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        which: jax.Array | None,
        added: jax.Array | None,
        stored: LayerCache | None,
        angles: jax.Array | None,
        mask: jax.Array | None,
        segments: jax.Array | None,
        start: jax.Array | None,
        temperature: float | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x (B, S, E) -> y (B, S, E), stored. Arguments as the Transformer's, of one layer.

        `which` picks this layer's mask out of a stack, `added` (B, S, E) is this layer's part of `layer_inputs`; both
        may be None.
        """
        c = self.cfg
        x = checkpoint_name(x, LAYER_INPUT)
        if added is not None:
            x = x + added.astype(x.dtype)
        if which is not None:
            assert mask is not None, "mask_of_layer picks from a stack of masks"
            mask = mask[which]
        y, stored = Attention(c, name="attention")(
            Norm(c.norm, c.norm_eps, name="attention_norm")(x), angles, mask, segments, stored, start, temperature
        )
        x = x + self.branch("attention", y)
        y = MLP(c, name="mlp")(Norm(c.norm, c.norm_eps, name="mlp_norm")(x))
        x = x + self.branch("mlp", y)
        return constrain(x, "batch", "sequence", "embed"), stored

    def branch(self, name: str, y: jax.Array) -> jax.Array:
        """What attention or the MLP adds to the residual stream, from its output (B, S, E)."""
        c = self.cfg
        if c.post_norm:
            y = Norm("rms_zero", name=f"{name}_post_norm")(y)
        if c.layer_scale:
            y = y * self.param(f"{name}_layer_scale", nn.initializers.ones, (c.width,)).astype(y.dtype)
        if c.dropout and self.has_rng("dropout"):
            y = nn.Dropout(c.dropout, deterministic=False)(y)
        return y


class Transformer(nn.Module):
    """The layers, without a final norm.

    Parameters are stacked along a leading axis L under "layers"; without `scan` they are "layers_0", "layers_1", ...
    """

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        temperature: float = 1.0,
        mask_of_layer: jax.Array | None = None,
        segments: jax.Array | None = None,
        layer_inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """x (B, S, E) -> y (B, S, E) and the cache grown by S positions.

        angles: rotary angles (B, S, K/2); None: no rotation.
        mask: (B, S, S) bool, True where query s sees key c. None: attention is causal, and stays within the documents
            of `segments` (B, S) if these are given.
        cache: the positions before x, which every position of x sees. Such a call is causal and takes no mask.
        temperature: divides the attention logits of a call with a cache. Other calls refuse it: their kernels need a
            static scale, and a value that passes through `nn.scan` is traced.
        mask_of_layer: (L,) int. Then `mask` is a stack (A, B, S, S), and layer l uses mask[mask_of_layer[l]].
        layer_inputs: (L, B, S, E), of which layer l adds its own part to its input.
        """
        c, policy = self.cfg, self.cfg.remat
        if cache is None and not (isinstance(temperature, float) and temperature == 1.0):
            raise ValueError("only a call with a cache takes a temperature")
        layer = Layer if policy == "none" else nn.remat(Layer, prevent_cse=not c.scan, policy=REMAT[policy])
        x = constrain(x, "batch", "sequence", "embed")
        if c.scan and cache is None:
            in_axes: Any = (0, 0, *[nn.broadcast] * 6)  # Flax's annotation allows integers alone
            scan = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=in_axes,
                length=c.layers,
                unroll=1 if self.is_initializing() else c.unroll,  # the same parameters, compiled faster
            )
            x, _ = scan(c, name="layers")(x, mask_of_layer, layer_inputs, None, angles, mask, segments, None, None)
            return x, None
        start: jax.Array | None = None
        stored: list[Any] = [None] * c.layers
        if cache is not None:
            start, stored = cache.length, list(zip(cache.keys, cache.values, strict=True))
            mask = attention.cached_mask(start, x.shape[1], cache.capacity)
        for i in range(c.layers):
            if c.scan:
                own = jax.tree.map(lambda p, i=i: p[i], self.variables["params"]["layers"])
                run = partial(Layer(c, parent=None).apply, {"params": own})
            else:
                run = layer(c, name=f"layers_{i}")
            which, added = (None if a is None else a[i] for a in (mask_of_layer, layer_inputs))
            x, stored[i] = run(x, which, added, stored[i], angles, mask, segments, start, temperature)
        if cache is not None:
            keys, values = zip(*stored, strict=True)
            cache = KVCache(keys, values, cache.length + x.shape[1])
        return x, cache

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of `batch` rows with room for `capacity` positions each."""
        c = self.cfg
        return KVCache.empty(c.layers, batch, capacity, c.kv, c.head, jnp.dtype(c.dtype))


def separate_layers(params: dict) -> dict:
    """Parameters of modules with `scan` -> of the same modules without: "layers" becomes "layers_0", "layers_1", ..."""
    found = {}
    for name, group in params.items():
        if name == "layers":
            count = len(jax.tree.leaves(group)[0])
            found |= {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], group) for i in range(count)}
        else:
            found[name] = separate_layers(group) if isinstance(group, dict) else group
    return found
