"""The pre-norm Transformer that every stream is built from, and its parts."""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from starflow2_jax.errors import UserError, require_one_of, require_positive
from starflow2_jax.models import attention
from starflow2_jax.models.attention import KVCache
from starflow2_jax.models.kernels import PLATFORMS, SAVED, attend_packed
from starflow2_jax.parallel.sharding import constrain, constrain_parameter

LAYER_INPUT = "layer_input"
_POLICIES = jax.checkpoint_policies
# What of a layer the backward pass finds saved; the rest it computes again.
REMAT = {
    "none": None,  # all
    "full": _POLICIES.nothing_saveable,  # the layer's input
    # That, the outputs of matrix products with weights, and what splash attention's backward pass needs.
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(SAVED)
    ),
    # The layer's input, in the host's memory.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def widened(x: jax.Array) -> jax.Array:
    """x in fp32, or in float64 where it is that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, in fp32 at least, as PyTorch writes it: by erf, which a TPU computes in one pass, unlike jax.nn.gelu's erfc."""
    wide = widened(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

NORMS = ("layer", "rms", "rms_zero")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of identical pre-norm layers: x + attention(norm(x)), then x + mlp(norm(x)). Raises UserError for values
    that mean nothing or do not fit each other."""

    layers: int
    width: int  # E
    heads: int  # H
    mlp_hidden: int  # F
    kv_heads: int = 0  # J; 0: as many as heads
    head_dim: int = 0  # K; 0: width / heads
    norm: str = "rms"  # "layer", "rms" (x w), "rms_zero" (x (1 + w))
    norm_eps: float = 1e-6
    activation: str = "gelu"
    gated_mlp: bool = False  # act(gate) * up
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head of q and k, before the rotation
    post_norm: bool = False  # RMS norm after attention and after the MLP
    dropout: float = 0.0  # of what a branch adds to the stream; only where a "dropout" key is given: in training
    layer_scale: bool = False  # a learned factor per channel on what attention and the MLP add
    dtype: str = (
        "float32"  # of the matrix products; norms, softmax and rotations are fp32 always (float64 is for tests)
    )
    remat: str = "none"  # a key of REMAT
    kernel: str = "xla"  # of attention over whole rows, see kernels.py
    scan: bool = True  # the layers' parameters are stacked and scanned over; False: each has its own, for decoding
    unroll: int = 1  # layers a step of the scan; all of them is fastest on CPU

    def __post_init__(self):
        for name, allowed in (("norm", NORMS), ("activation", ACTIVATIONS), ("dtype", DTYPES), ("kernel", PLATFORMS)):
            require_one_of(name, getattr(self, name), allowed)
        require_one_of("remat", self.remat, REMAT)
        require_positive(
            layers=self.layers, width=self.width, heads=self.heads, mlp_hidden=self.mlp_hidden, unroll=self.unroll
        )
        if not self.head_dim and self.width % self.heads:
            raise UserError(f"heads={self.heads} must divide width={self.width}, or head_dim be given")
        if self.heads % self.kv:
            raise UserError(f"kv_heads={self.kv} must divide heads={self.heads}")

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        return self.head_dim or self.width // self.heads


def require_sections(name: str, sections: tuple[int, ...], head: int) -> None:
    """Raises UserError where rotary sections (of time, row, column) do not make up the pairs of a head's channels."""
    if len(sections) != 3 or 2 * sum(sections) != head:
        raise UserError(f"{name}={tuple(sections)} must be three numbers that sum to half of a head's {head} channels")


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in fp32 at least, returned in x's dtype."""

    kind: str = "rms"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
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


def _cast_on_shards(path: str, x, kernel, bias, dtype=None, inexact=True):
    """Flax's promotion of types, the kernel pinned to its shards after it: what is gathered is of the smaller type."""
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype, inexact=inexact)
    return x, constrain_parameter(kernel, path), bias


def dense(features, name: str, bias: bool, dtype: str, axis=-1, gain: float = 1.0, part: str = "") -> nn.DenseGeneral:
    """A linear map with fan-in initialisation of variance `gain`^2 / fan-in. `part`: the module it lies in, for its shards."""
    init = nn.initializers.variance_scaling(gain**2, "fan_in", "normal") if gain else nn.initializers.zeros
    cast = partial(_cast_on_shards, f"{part}/{name}/kernel")
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=dtype, kernel_init=init, promote_dtype=cast, name=name
    )


class Attention(nn.Module):
    """Multi-head causal self-attention with grouped key/value heads."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x, angles, mask, segments, stored, start, temperature):
        """`stored` (keys, values), `start` and `temperature` belong to a call with a cache; without one they are None."""
        c = self.cfg
        linear = partial(dense, dtype=c.dtype, part="attention")
        q = linear((c.heads, c.head), "query", c.qkv_bias)(x)
        k = linear((c.kv, c.head), "key", c.qkv_bias)(x)
        v = linear((c.kv, c.head), "value", c.qkv_bias)(x)
        if c.qk_norm:
            q, k = Norm("rms_zero", name="query_norm")(q), Norm("rms_zero", name="key_norm")(k)
        if angles is not None:
            q, k = attention.rotate(q, angles), attention.rotate(k, angles)
        q = constrain(q, "batch", "sequence", "heads", None)
        if stored is not None:
            stored = tuple(attention.write_cache(old, new, start) for old, new in zip(stored, (k, v), strict=True))
            k, v = (a.astype(q.dtype) for a in stored)
            out = attention.attend_cached(q, k, v, mask, temperature)
        elif mask is None:
            out = attend_packed(q, k, v, segments, c.kernel)
        else:
            out = attention.attend(q, k, v, mask)
        out = linear(c.width, "out", c.out_bias, axis=(-2, -1), gain=(2 * c.layers) ** -0.5)(out)
        return out, stored


class MLP(nn.Module):
    """Linear, activation, linear; or the gated form act(gate(x)) * up(x)."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.cfg
        act = ACTIVATIONS[c.activation]
        linear = partial(dense, bias=c.mlp_bias, dtype=c.dtype, part="mlp")
        up = linear(c.mlp_hidden, "up")(x)
        hidden = act(linear(c.mlp_hidden, "gate")(x)) * up if c.gated_mlp else act(up)
        hidden = constrain(hidden, "batch", "sequence", "hidden")
        return linear(c.width, "down", gain=(2 * c.layers) ** -0.5)(hidden)


class Layer(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x, which, stored, angles, mask, segments, start, temperature):
        c = self.cfg
        x = checkpoint_name(x, LAYER_INPUT)
        mask = mask if which is None else mask[which]
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
    """The layers, no final norm. Parameters carry a leading axis L, as "layers"; without `scan` they are "layers_0" and on."""

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
    ) -> tuple[jax.Array, KVCache | None]:
        """x (B, S, E), angles (B, S, K/2) or None, mask (B, S, S) -> y (B, S, E) and the cache grown by S positions.

        All positions are here: they see what is before them, within the documents of `segments` (B, S), or in the row
        without; or what `mask` says. With `cache` the earlier positions are in it (it brings its own mask).
        `temperature` divides the attention logits of a call with a cache. Other calls refuse it: their kernels need a static
        scale, and a value that goes through `nn.scan` is traced.
        With `mask_of_layer` (L,) int, `mask` is a stack (A, B, S, S) and layer l sees through mask[mask_of_layer[l]].
        """
        c, policy = self.cfg, self.cfg.remat
        if cache is None and not (isinstance(temperature, float) and temperature == 1.0):
            raise ValueError("only a call with a cache takes a temperature")
        layer = Layer if policy == "none" else nn.remat(Layer, prevent_cse=not c.scan, policy=REMAT[policy])
        x = constrain(x, "batch", "sequence", "embed")
        if c.scan and cache is None:
            scan = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, *[nn.broadcast] * 6),
                length=c.layers,
                unroll=1 if self.is_initializing() else c.unroll,  # the same parameters, compiled faster
            )
            x, _ = scan(c, name="layers")(x, mask_of_layer, None, angles, mask, segments, None, None)
            return x, None
        start, stored = None, [None] * c.layers
        if cache is not None:
            start, stored = cache.length, list(zip(cache.keys, cache.values, strict=True))
            mask = attention.cached_mask(start, x.shape[1], cache.capacity)
        for i in range(c.layers):
            if c.scan:
                own = jax.tree.map(lambda p, i=i: p[i], self.variables["params"]["layers"])
                run = partial(Layer(c, parent=None).apply, {"params": own})
            else:
                run = layer(c, name=f"layers_{i}")
            which = None if mask_of_layer is None else mask_of_layer[i]
            x, stored[i] = run(x, which, stored[i], angles, mask, segments, start, temperature)
        if cache is not None:
            cache = KVCache(*zip(*stored, strict=True), cache.length + x.shape[1])
        return x, cache

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        c = self.cfg
        return KVCache.empty(c.layers, batch, capacity, c.kv, c.head, jnp.dtype(c.dtype))


def separate_layers(params: dict) -> dict:
    """Parameters as a Transformer with `scan` keeps them -> as one without does."""
    found = {}
    for name, group in params.items():
        if name == "layers":
            count = len(jax.tree.leaves(group)[0])
            found |= {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], group) for i in range(count)}
        else:
            found[name] = separate_layers(group) if isinstance(group, dict) else group
    return found
