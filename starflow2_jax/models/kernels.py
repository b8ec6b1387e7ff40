"""Causal attention over whole rows of packed documents, by the kernel that the config names, on any mesh.

xla                 plain matrix products, on every platform
cudnn               cuDNN's flash attention, on NVIDIA GPUs; a bias (B, 1, S, S) keeps packed documents apart
cudnn_packed        the same with the documents' offsets instead of the bias, on GPUs of compute capability 9.0 or newer
triton              JAX's flash attention in Triton (Pallas), on NVIDIA GPUs; it takes the segment ids
triton_interpreted  the same, interpreted, for tests on CPU
splash              JAX's splash attention (Pallas), on TPUs
splash_interpreted  the same, interpreted, for tests on CPU
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from starflow2_jax.errors import UserError
from starflow2_jax.models.attention import attend
from starflow2_jax.parallel.hardware import compute_capability
from starflow2_jax.parallel.sharding import constrain

GPU = ("gpu", "cuda", "rocm")  # JAX's names of the platform
# Kernel -> the platforms that it runs on; (): all.
PLATFORMS = {
    "xla": (),
    "cudnn": GPU,
    "cudnn_packed": GPU,
    "triton": GPU,
    "triton_interpreted": (),
    "splash": ("tpu",),
    "splash_interpreted": (),
}
SAVED = "attention"  # name, for remat policies, of the values that splash attention's backward pass needs
LANES = 128  # lanes of a TPU; splash attention takes blocks and heads that are multiples of it
BLOCKS = (512, 256, 128)  # positions of a splash block; the largest that divides a row is taken
TRITON_BLOCK = 32  # positions of a block in the Triton kernel's backward pass; rows are multiples of it


def attend_packed(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, kernel: str = "xla"
) -> jax.Array:
    """Causal softmax attention in which a position sees only positions of its own segment.

    q (B, S, H, K); k, v (B, S, J, K), J divides H; segments (B, S) int, None: each row is one document. Padding is a
    segment like any other, so its values stay finite. Logits are scaled by K^-0.5. Returns (B, S, H, K) in q's dtype.

    On a mesh with a sequence axis each device keeps its queries and gathers the keys and values of whole rows: with
    grouped heads they are small, and one kernel call sees the whole row, unlike in ring attention. Raises UserError for
    an unknown kernel, or one that does not take these shapes on this platform.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    ways = sizes.get("sequence", 1)
    ways = ways if q.shape[1] % ways == 0 else 1
    _refuse(kernel, q, ways, mesh)
    if kernel == "xla":
        if ways > 1:
            k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
        return attend(q, k, v, visible(segments, segments, 0, q.shape[1]))
    k, v, heads = _heads(q, k, v, sizes.get("tensor", 1))
    rows = _rows(q.shape[0], sizes)
    tensor = sizes["tensor"] if heads else 1  # devices that share the heads
    local = _splash_kernel(q, tensor, ways, kernel) if kernel.startswith("splash") else None
    body: Any = partial(_on_a_device, kernel=kernel)
    start = jnp.arange(ways) * (q.shape[1] // ways)  # of each device's queries
    if mesh.empty:
        return body(q, k, v, segments, segments, start, local)
    cut = "sequence" if ways > 1 else None
    queries, keys = P(rows, cut, heads, None), P(rows, None, heads, None)
    ids = (None, None) if segments is None else (P(rows, cut), P(rows, None))
    there = local and local.manual_sharding_spec(NamedSharding(mesh, P(None, cut)))
    specs = (queries, keys, keys, *ids, P(cut), there)
    on_shards: Any = jax.shard_map(body, in_specs=specs, out_specs=queries, check_vma=False)
    return on_shards(q, k, v, segments, segments, start, local)


def visible(
    queries: jax.Array | None, keys: jax.Array | None, start: int | jax.Array, size: int, length: int = 0
) -> jax.Array:
    """(B or 1, size, length) bool: query i, at position start + i, sees the keys of its segment up to its position.

    queries (B, size) and keys (B, length) are segment ids, None if all are equal. length 0: as many keys as queries.
    """
    causal = (start + jnp.arange(size))[:, None] >= jnp.arange(length or size)
    if queries is None or keys is None:
        return causal[None]
    return causal & (queries[:, :, None] == keys[:, None, :])


def most_documents(length: int) -> int:
    """Most documents that a row of `length` positions may hold for the kernel "cudnn_packed", padding not counted.

    The number is a static size of cuDNN's call, whose time grows with it. It allows documents of 128 positions on
    average, and at least 8 documents.
    """
    return max(8, length // 128)


def _on_a_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    keys: jax.Array | None,
    start: jax.Array,
    local: splash.SplashAttentionKernel | None,
    *,
    kernel: str,
) -> jax.Array:
    """Attention of one device's rows, heads and queries to all keys of their rows.

    segments (B, S) are the segment ids of the queries, which begin at position start[0]; keys (B, C) are those of the
    keys; both are None if each row is one document.
    """
    if kernel.startswith("triton"):
        return _triton(q, k, v, segments, interpret=kernel == "triton_interpreted")
    if kernel == "cudnn_packed" and segments is not None:
        return _cudnn_packed(q, k, v, segments)
    if local is None:
        return _cudnn(q, k, v, segments, keys, start[0])
    return _splash(local, q, k, v, segments, keys)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, keys: jax.Array | None, start: jax.Array
) -> jax.Array:
    """cuDNN's attention.

    It takes no segment ids and no start, so a mask (B, 1, S, C) says what a query sees, if needed.
    """
    apart = keys is not None or q.shape[1] < k.shape[1]
    mask = jax.lax.stop_gradient(visible(segments, keys, start, q.shape[1], k.shape[1]))[:, None] if apart else None
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=q.shape[-1] ** -0.5,
        is_causal=q.shape[1] == k.shape[1],
        implementation="cudnn",
    )


def _cudnn_packed(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """cuDNN's attention over whole rows in its packed layout, which takes the offset of each document.

    segments (B, S) are runs of equal ids, padding included, and at most `most_documents` + 1 of them. A row with more
    runs becomes NaN, because cuDNN would leave out the runs that are too many. JAX 0.10.2 computes the offsets of
    grouped keys with the stride of the queries, so keys and values are repeated to as many heads as the queries have.
    """
    if q.size >= 2**31:
        raise UserError(
            f"the attention kernel 'cudnn_packed' counts in 32 bits, too few for {q.shape[0]} rows of {q.shape[1]} "
            "positions on a device; lower rows, raise accumulate or set kernel to 'cudnn'"
        )
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    offsets, lengths, too_many = _documents(segments, most_documents(q.shape[1]) + 1)
    v = jnp.where(too_many[:, None, None, None], jnp.nan, v)
    attention: Any = cudnn.dot_product_attention
    return attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )


def _triton(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, interpret: bool) -> jax.Array:
    """JAX's flash attention in Triton over whole rows.

    It takes as many heads of keys as of queries, so they are repeated. It compares segment ids pair by pair: its memory
    does not grow with S x S, but it computes all pairs that causality leaves. Blocks of the forward pass are as large
    as the shared memory of an A100 allows. JAX 0.12 deprecates the module in favour of tokamax, so it is imported only
    here.
    """
    from jax.experimental.pallas.ops.gpu import attention as triton

    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    S, most = q.shape[1], 128 if q.shape[3] <= 128 else 64
    block = next(b for b in (128, 64, TRITON_BLOCK) if b <= most and S % b == 0)
    back = {f"block_{of}": TRITON_BLOCK for of in ("q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    blocks = triton.BlockSizes(block_q=block, block_k=block, **back)
    attention: Any = triton.mha
    return attention(
        q, k, v, segments, sm_scale=q.shape[3] ** -0.5, causal=True, block_sizes=blocks, interpret=interpret
    )


def _documents(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the runs of equal ids in segments (B, S).

    Returns their first positions (B, most + 1), closed by S, their lengths (B, most), and whether a row has more than
    `most` runs (B,). Positions and lengths are int32, and -1 where a row has fewer runs.
    """
    B, S = segments.shape
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    count = jnp.sum(begins, axis=1, keepdims=True)
    which = jnp.where(begins, jnp.cumsum(begins, axis=1) - 1, most)
    rows = jnp.broadcast_to(jnp.arange(B)[:, None], (B, S))
    first = jnp.full((B, most + 1), S, jnp.int32).at[rows, which].min(jnp.arange(S, dtype=jnp.int32), mode="drop")
    first = first.at[:, most].set(S)
    lengths = jnp.where(jnp.arange(most) < count, first[:, 1:] - first[:, :-1], -1)
    return jnp.where(jnp.arange(most + 1) < count, first, -1), lengths, count[:, 0] > most


def _splash(
    local: splash.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    keys: jax.Array | None,
) -> jax.Array:
    """Splash attention, which takes (heads, positions, channels) of a row and does not scale the logits."""
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    ids = None if segments is None or keys is None else splash.SegmentIds(segments, keys)
    every_row: Any = jax.vmap(local)
    return every_row(q, k, v, ids).swapaxes(1, 2)


def _splash_kernel(q: jax.Array, tensor: int, ways: int, kernel: str) -> splash.SplashAttentionKernel:
    """The kernel for one of `tensor` shares of the heads, and rows and mask tables cut into `ways` parts."""
    S, heads = q.shape[1], q.shape[2] // tensor
    block_q, block_kv = (next(b for b in BLOCKS if size % b == 0) for size in (S // ways, S))
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        mask=splash_mask.MultiHeadMask([splash_mask.CausalMask((S, S))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=ways,
        residual_checkpoint_name=SAVED,
        interpret=kernel == "splash_interpreted",
    )


def _heads(q: jax.Array, k: jax.Array, v: jax.Array, tensor: int) -> tuple[jax.Array, jax.Array, str | None]:
    """Keys and values whose heads can be cut like those of the queries, and the mesh axis that cuts all of them.

    If several of the `tensor` devices need the same head of keys and values, the head is repeated. The axis is None if
    the heads stay whole.
    """
    H, J = q.shape[2], k.shape[2]
    times = tensor // math.gcd(J, tensor)
    if tensor == 1 or H % tensor or (H // J) % times:
        return k, v, None
    if times > 1:
        k, v = (jnp.repeat(a, times, axis=2) for a in (k, v))
    return k, v, "tensor"


def _rows(B: int, sizes: dict) -> tuple[str, ...] | None:
    """The mesh axes that cut B rows; None if they do not divide B."""
    axes = ("data", "fsdp")
    return axes if B % math.prod(sizes.get(a, 1) for a in axes) == 0 else None


def _refuse(kernel: str, q: jax.Array, ways: int, mesh: AbstractMesh) -> None:
    """Raises UserError if the kernel does not take queries q (B, S, H, K) on this platform, cut into `ways` parts."""
    if kernel not in PLATFORMS:
        raise UserError(f"the attention kernel must be one of {', '.join(PLATFORMS)}, not {kernel!r}")
    device = (None if mesh.empty else mesh.abstract_device) or jax.devices()[0]
    S, K, platforms = q.shape[1], q.shape[3], PLATFORMS[kernel]
    if platforms and device.platform not in platforms:
        raise UserError(
            f"the attention kernel {kernel!r} runs on {platforms[0]}, not on {device.platform}; set kernel to 'xla'"
        )
    if kernel.startswith("splash") and (S % (LANES * ways) or K % LANES):
        raise UserError(
            f"splash attention takes rows of a multiple of {LANES * ways} positions and heads of a multiple of {LANES} "
            f"channels, not {S} and {K}; set kernel to 'xla'"
        )
    if kernel in ("cudnn_packed", "triton", "triton_interpreted") and ways > 1:
        raise UserError(
            f"the attention kernel {kernel!r} takes whole rows; set mesh.sequence to 1, or kernel to 'cudnn'"
        )
    capability = compute_capability(device.device_kind) if platforms == GPU else None
    if kernel == "cudnn_packed" and capability and capability < (9, 0):
        raise UserError(
            f"the attention kernel 'cudnn_packed' needs compute capability 9.0, but {device.device_kind} has "
            f"{capability[0]}.{capability[1]}; set kernel to 'triton'"
        )
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    most = 256 if capability and capability >= (9, 0) else 128
    if kernel.startswith("cudnn") and (not half or K % 8 or K > most or S % 2):
        raise UserError(
            f"cuDNN's attention takes bfloat16 or float16, heads of a multiple of 8 channels up to {most} and an even "
            f"number of positions, not {q.dtype}, {K} and {S}; set kernel to 'xla'"
        )
    if kernel.startswith("triton") and (S % TRITON_BLOCK or K > 256 or (kernel == "triton" and not half)):
        raise UserError(
            f"the attention kernel 'triton' takes bfloat16 or float16, heads of up to 256 channels and rows of a "
            f"multiple of {TRITON_BLOCK} positions, not {q.dtype}, {K} and {S}; set kernel to 'xla'"
        )
