"""Every attention kernel against softmax written out, on packed rows, forward and backward."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.errors import UserError
from starflow2_jax.models import kernels
from starflow2_jax.models.kernels import attend_packed
from starflow2_jax.models.layers import Transformer, TransformerConfig
from starflow2_jax.parallel import sharding

STREAMS = {"vlm": (4, 2), "flow": (2, 2)}  # heads of the queries; of keys and values
S, K = 256, 128


def inputs(heads: str, rows: int = 2, dtype=np.float32):
    """q, k, v, a cotangent; and segment ids: documents that end within a block and at its edge, and padding."""
    H, J = STREAMS[heads]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((rows, S, n, K)).astype(dtype) for n in (H, J, J, H)]
    ends = [(50, 128, 200), (100, 256, 256), (1, 2, 256), (256, 256, 256)]
    segments = np.stack([np.searchsorted(ends[b], np.arange(S), side="right") + 1 for b in range(rows)])
    segments[0, 200:] = 0
    return arrays, segments.astype(np.int32)


def written_out(q, k, v, segments):
    """Attention in float64, one query after another, by exponentials over the visible keys."""
    q, k, v = (jnp.asarray(a, jnp.float64 if jax.config.jax_enable_x64 else jnp.float32) for a in (q, k, v))
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    logits = jnp.einsum("bshk,bchk->bhsc", q, k) / np.sqrt(K)
    see = np.tril(np.ones((S, S), bool)) & (segments[:, :, None] == segments[:, None, :])
    weights = jnp.exp(logits) * see[:, None]
    return jnp.einsum("bhsc,bchk->bshk", weights / weights.sum(-1, keepdims=True), v)


def compare(run, arrays, segments, tolerance):
    """Outputs and the gradients with respect to queries, keys and values."""

    def both(f):
        @jax.jit  # the arrays are arguments: XLA would compute a program of constants while it compiles, slowly
        def compute(q, k, v, cotangent):
            out, back = jax.vjp(f, q, k, v)
            return out, *back(cotangent.astype(out.dtype))

        return compute(*arrays)

    for a, b in zip(both(run), both(lambda q, k, v: written_out(q, k, v, segments)), strict=True):
        np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=0, atol=tolerance * float(np.abs(np.float32(b)).max())
        )


@pytest.mark.parametrize("kernel", ("xla", "splash_interpreted", "triton_interpreted"))
@pytest.mark.parametrize("stream", STREAMS)
def test_kernels_on_packed_rows(kernel, stream):
    arrays, segments = inputs(stream)
    compare(lambda q, k, v: attend_packed(q, k, v, segments, kernel), arrays, segments, 1e-5)


@pytest.mark.parametrize("kernel", ("xla", "splash_interpreted", "triton_interpreted"))
def test_rows_of_one_document(kernel):
    arrays, segments = inputs("flow", 1)
    compare(lambda q, k, v: attend_packed(q, k, v, None, kernel), arrays, np.zeros_like(segments), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ("cudnn", "cudnn_packed"))
@pytest.mark.parametrize("stream", STREAMS)
def test_cudnn_on_packed_rows(stream, kernel):
    arrays, segments = inputs(stream, 4, dtype=jnp.bfloat16)
    compare(lambda q, k, v: attend_packed(q, k, v, jnp.asarray(segments), kernel), arrays, segments, 2e-2)


@pytest.mark.gpu
def test_cudnn_says_when_a_row_holds_too_many_documents():
    (q, k, v, _), segments = inputs("vlm", dtype=jnp.bfloat16)
    segments[1] = np.arange(S) // (S // 16)  # sixteen documents; there is room for eight and padding
    out = jax.jit(lambda q, k, v: attend_packed(q, k, v, jnp.asarray(segments), "cudnn_packed"))(q, k, v)
    assert np.isfinite(np.float32(out[0])).all() and np.isnan(np.float32(out[1])).all()


def test_where_documents_lie_in_a_row():
    """Against positions counted one by one, padding in the middle and at the end, and a row with one document too
    many.
    """
    segments = np.array([[1, 1, 2, 3, 3, 3, 0, 0], [1] * 8, [1, 2, 3, 4, 5, 5, 5, 5], [4, 4, 0, 0, 5, 6, 6, 6]])
    offsets, lengths, too_many = kernels._documents(jnp.asarray(segments), 4)
    for row in (0, 1, 3):
        begins = [i for i in range(8) if i == 0 or segments[row, i] != segments[row, i - 1]]
        ends = [*begins[1:], 8]
        assert offsets[row].tolist() == begins + [-1] * (5 - len(begins))
        assert lengths[row].tolist() == [b - a for a, b in zip(begins, ends, strict=True)] + [-1] * (4 - len(begins))
    assert too_many.tolist() == [False, False, True, False]


@pytest.mark.parametrize("stream", STREAMS)
def test_what_packed_cudnn_is_told(monkeypatch, cudnn_anywhere, stream):
    """The arguments of cuDNN's packed call, computed document by document: the same heads, lengths and first
    positions.
    """

    def stand_in(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type.name == "PADDING_CAUSAL" and k.shape == v.shape == q.shape
        assert (q_seqlen == kv_seqlen).all() and (q_offsets == kv_offsets).all()
        out = np.zeros(q.shape, np.float32)
        for b in range(len(q)):
            for at, size in zip(q_offsets[b], q_seqlen[b], strict=False):
                here = slice(at, at + size)
                if size > 0:
                    plain = jax.nn.dot_product_attention(
                        *(a[b : b + 1, here] for a in (q, k, v)), scale=scale, is_causal=True
                    )
                    out[b, here] = plain[0]
        return out

    monkeypatch.setattr(kernels.cudnn, "dot_product_attention", stand_in)
    (*qkv, _), segments = inputs(stream, 4, dtype=jnp.bfloat16)
    found = attend_packed(*map(jnp.asarray, qkv), jnp.asarray(segments), "cudnn_packed")
    np.testing.assert_allclose(found, written_out(*(np.float32(a) for a in qkv), segments), atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", STREAMS)
def test_cudnn_on_rows_that_are_cut(stream):
    """Each half of the queries alone, as on the devices of a mesh with two along the sequence axis."""
    arrays, segments = inputs(stream, dtype=jnp.bfloat16)

    def run(q, k, v):
        halves = [
            kernels._on_a_device(
                q[:, half], k, v, segments[:, half], segments, jnp.array([half.start]), None, kernel="cudnn"
            )
            for half in (slice(0, S // 2), slice(S // 2, S))
        ]
        return jnp.concatenate(halves, axis=1)

    compare(run, arrays, segments, 2e-2)


# Two heads of keys and values over two or four devices: split, or shared by two; rows that cannot be split: whole
# everywhere.
@pytest.mark.parametrize(
    "kernel, mesh, rows",
    [
        ("xla", dict(data=2, sequence=4), 2),
        ("xla", dict(data=1, fsdp=2, sequence=2, tensor=2), 1),
        ("xla", dict(data=1, sequence=2, tensor=4), 2),
        ("splash_interpreted", dict(data=2, fsdp=2, tensor=2), 4),
        ("splash_interpreted", dict(data=2, sequence=2, tensor=2), 2),
        ("splash_interpreted", dict(data=2, tensor=4), 2),
        ("triton_interpreted", dict(data=2, fsdp=2, tensor=2), 4),
        ("triton_interpreted", dict(data=2, tensor=4), 2),
    ],
)
def test_kernels_on_a_mesh(kernel, mesh, rows):
    arrays, segments = inputs("vlm", rows)
    mesh = sharding.make_mesh(**mesh)

    def run(q, k, v):
        q = sharding.constrain(q, "batch", "sequence", "heads", None)
        return attend_packed(q, k, v, jnp.asarray(segments), kernel)

    with jax.set_mesh(mesh):
        compare(run, arrays, segments, 1e-5)


@pytest.fixture
def cudnn_anywhere(monkeypatch):
    monkeypatch.setattr(kernels, "PLATFORMS", kernels.PLATFORMS | {"cudnn": None, "cudnn_packed": None})


# Of one device: heads of the queries, heads of the keys, queries.
@pytest.mark.parametrize(
    "mesh, local",
    [(None, (4, 2, S)), (dict(data=4, tensor=2), (2, 1, S)), (dict(data=4, sequence=2), (4, 2, S // 2))],
)
def test_cudnn_is_told_of_documents(monkeypatch, cudnn_anywhere, mesh, local):
    """The call to cuDNN, lowered for an NVIDIA GPU without having one.

    It is causal for whole rows of one document. For packed documents or cut rows a bias says what is visible.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    (q, k, v, _), segments = inputs("vlm", dtype=jnp.bfloat16)

    def lowered(segments):
        traced = jax.jit(lambda q, k, v: attend_packed(q, k, v, segments, "cudnn")).trace(q, k, v)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    with jax.set_mesh(sharding.make_mesh(**mesh)) if mesh else contextlib.nullcontext():
        packed, single = lowered(segments), lowered(None)
    H, J, queries = local
    cut = queries < S
    for text, bias in ((packed, "2"), (single, "1" if cut else "")):
        [call] = (line for line in text.splitlines() if "@__cudnn$fmha" in line)
        assert ("fmhaScaleBiasSoftmax" if bias else "fmhaSoftmax") in call
        assert ("NO_MASK" if cut else "CAUSAL") in call
        operands = [f"2x{queries}x{H}x{K}", *[f"2x{S}x{J}x{K}"] * 2, *([f"{bias}x1x{queries}x{S}"] if bias else [])]
        assert f": ({', '.join(f'tensor<{shape}xbf16>' for shape in operands)}) ->" in call


@pytest.mark.parametrize("remat", ("none", "full", "dots"))
def test_cudnn_within_a_scanned_stack(monkeypatch, cudnn_anywhere, remat):
    """cuDNN's softmax scale is an attribute of the call, so it must stay a Python number inside nn.scan and
    nn.remat.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    cfg = TransformerConfig(layers=2, width=256, heads=2, mlp_hidden=256, dtype="bfloat16", remat=remat, kernel="cudnn")
    model, x, segments = Transformer(cfg), jnp.ones((2, S, 256)), jnp.asarray(inputs("flow")[1])
    params = jax.eval_shape(lambda: Transformer(replace(cfg, kernel="xla")).init(jax.random.key(0), x, None))

    def loss(params):
        return model.apply(params, x, None, segments=segments)[0].sum()

    text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") and text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(")


def test_only_a_cached_call_takes_a_temperature():
    model, x = Transformer(TransformerConfig(layers=2, width=32, heads=2, mlp_hidden=48)), jnp.ones((1, 4, 32))
    with pytest.raises(ValueError, match="only a call with a cache"):
        model.init(jax.random.key(0), x, None, temperature=1.5)


@pytest.mark.parametrize("mesh", (dict(data=4, tensor=2), dict(data=2, sequence=4)))
def test_what_cudnn_is_told_is_right(monkeypatch, cudnn_anywhere, mesh):
    """The mask and causality given to cuDNN, computed by JAX's own attention instead."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **k | {"implementation": "xla"}))
    arrays, segments = inputs("vlm", dtype=jnp.bfloat16)
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        compare(lambda q, k, v: attend_packed(q, k, v, jnp.asarray(segments), "cudnn"), arrays, segments, 2e-2)


@pytest.mark.parametrize(
    "kernel, shape, dtype, reason",
    [
        (
            "flash",
            (1, 256, 2, 128),
            jnp.float32,
            "the attention kernel must be one of xla, cudnn, cudnn_packed, triton",
        ),
        ("splash", (1, 256, 2, 128), jnp.float32, "'splash' runs on tpu, not on cpu"),
        ("cudnn", (1, 256, 2, 128), jnp.bfloat16, "'cudnn' runs on gpu, not on cpu"),
        ("triton", (1, 256, 2, 128), jnp.bfloat16, "'triton' runs on gpu, not on cpu"),
        (
            "triton_interpreted",
            (1, 200, 2, 128),
            jnp.float32,
            "rows of a multiple of 32 positions, not float32, 128 and 200",
        ),
        ("triton_interpreted", (1, 256, 2, 512), jnp.float32, "heads of up to 256 channels"),
        ("splash_interpreted", (1, 200, 2, 128), jnp.float32, "rows of a multiple of 128 positions"),
        ("splash_interpreted", (1, 256, 2, 64), jnp.float32, "not 256 and 64"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(kernel, shape, dtype, reason):
    q = jnp.zeros(shape, dtype)
    with pytest.raises(UserError, match=reason):
        attend_packed(q, q, q, None, kernel)
