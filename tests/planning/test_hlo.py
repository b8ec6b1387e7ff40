"""Counting in the text of compiled modules: against arithmetic, on small programs and on texts as TPU compilers write
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow2_jax.planning.hlo import Module, convolution_flops

LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, /*index=2*/f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=2
  %next = s32[]{:T(128)} add(%i, %two)
  %y = f32[4,8]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%next, %y, %w)
}

%condition (p.1: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %nine = s32[]{:T(128)} constant(9)
  %j = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %nine), direction=LT
}

ENTRY %main (a: f32[4,8], b: f32[8,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %b = f32[8,8]{1,0:T(8,128)S(1)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%first, %a, %b)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)S(1)}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_loop_without_a_known_trip_count():
    module = Module(LOOP)
    assert module.trips(module.entry["loop"], module.entry) == 4  # 1, 3, 5, 7
    further = Module(LOOP.replace("direction=LT", "direction=LE"))
    assert further.trips(further.entry["loop"], further.entry) == 5  # and 9
    unknown = Module(LOOP.replace("constant(9)", "parameter(1)"))
    assert unknown.trips(unknown.entry["loop"], unknown.entry) is None


def test_shapes_with_layouts():
    body = Module(LOOP).computations["body"]
    assert [i.opcode for i in body.values()][-1] == "tuple" and body.root.name == "t"
    assert body["y"].bytes == body["y"].hbm == 4 * 8 * 4
    assert body["w"].bytes == 8 * 8 * 4 and body["w"].hbm == 0  # S(1) is not the main memory
    assert body["y"].operands == ["x", "w"]


@pytest.mark.parametrize(
    "left, right, out, attributes, products",
    [
        # x (4, 8) w (8, 16)
        ((4, 8), (8, 16), (4, 16), "dim_labels=bf_io->bf", 4 * 8 * 16),
        # six products (4, 8) (8, 16) side by side, the batch axis written as a dilated one
        (
            (4, 8, 6),
            (6, 8, 16),
            (4, 16, 6),
            "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=bf0_0io->bf0",
            6 * 4 * 8 * 16,
        ),
        # two of them, padded: half of the four pairs are with zeros
        (
            (4, 8, 1),
            (8, 2, 16),
            (2, 4, 16),
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->0bf",
            2 * 4 * 8 * 16,
        ),
    ],
)
def test_products_written_as_convolutions(left, right, out, attributes, products):
    assert convolution_flops(left, right, out, attributes) == 2 * products


def test_products_of_a_scan_and_its_gradient():
    L, E = 5, 8

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((L, E, E)), jnp.ones((16, E))).compile()
    module = Module(compiled.as_text())
    loops = [i for i in module.entry.values() if i.opcode == "while"]
    assert [module.trips(i, module.entry) for i in loops] == [L, L]
    inside = [sum(module.flops(body, i) for i in body.values()) for body in (module.called(i, "body") for i in loops)]
    assert np.sum(inside) == 3 * 2 * 16 * E * E


def test_a_kernels_own_estimate():
    call = '%k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"body": "x", "cost_estimate": {"flops": "4096", "transcendentals": "1"}}}'
    module = Module(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  ROOT {call}\n}}\n")
    assert module.flops(module.entry, module.entry["k"]) == 4096


@pytest.mark.parametrize(
    "phase, products", [("fwd_segmented_residuals", 2), ("dq_segmented_no_residuals", 3), ("dkv", 4)]
)
def test_attention_kernels_by_their_shapes(phase, products):
    text = f"""ENTRY %main (t: s8[1,4,4], q: bf16[2,24,512,128], k: bf16[2,4,2048,128]) -> f32[8] {{
  %t = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[2,24,512,128]{{3,2,1,0}} parameter(1)
  %k = bf16[2,4,2048,128]{{3,2,1,0}} parameter(2)
  ROOT %c = f32[8]{{0}} custom-call(%t, %q, %k, %k), custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/splash_mha_{phase}"}}
}}
"""
    module = Module(text)
    assert (
        module.flops(module.entry, module.entry["c"]) == products * 2 * 2 * 24 * 512 * 2048 * 128 / 2
    )  # half is masked


Q, KEYS = "bf16[2,512,24,128]", "bf16[2,2048,4,128]"
PAIRS = 2 * 24 * 512 * 2048  # of queries and keys, in all rows and heads


@pytest.mark.parametrize(
    "call, flops",
    [
        # cuDNN: its backward pass makes the logits again. Causality leaves half of all pairs, a bias all of them.
        ('__cudnn$fmhaSoftmax", backend_config={"mask_type": "PADDING_CAUSAL"}', 2 * 2 * PAIRS * 128 / 2),
        ('__cudnn$fmhaScaleBiasSoftmax", backend_config={"mask_type": "NO_MASK"}', 2 * 2 * PAIRS * 128),
        ('__cudnn$fmhaSoftmaxBackward", backend_config={"mask_type": "CAUSAL"}', 5 * 2 * PAIRS * 128 / 2),
        ('__gpu$xla.gpu.triton", metadata={op_name="jit(mha)/mha_forward/pallas_call"}', 2 * 2 * PAIRS * 128 / 2),
        ('__gpu$xla.gpu.triton", metadata={op_name="jit(mha)/mha_backward/pallas_call"}', 7 * 2 * PAIRS * 128 / 2),
        ('__gpu$xla.gpu.triton", metadata={op_name="jit(mha)/mha_preprocess_backward/pallas_call"}', 0),
    ],
)
def test_attention_kernels_of_gpus(call, flops):
    text = f"""ENTRY %main (q: {Q}, k: {KEYS}) -> bf16[2,512,24,128] {{
  %q = {Q}{{3,2,1,0}} parameter(0)
  %k = {KEYS}{{3,2,1,0}} parameter(1)
  ROOT %c = (bf16[2,512,24,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="{call}
}}
"""
    module = Module(text)
    assert module.flops(module.entry, module.entry["c"]) == flops


@pytest.mark.parametrize("target", ("__cublas$gemm", "__cublas$lt$matmul"))
def test_products_by_cublas(target):
    text = f"""ENTRY %main (a: bf16[3,64,128], b: bf16[3,256,128]) -> bf16[3,64,256] {{
  %a = bf16[3,64,128]{{2,1,0}} parameter(0)
  %b = bf16[3,256,128]{{2,1,0}} parameter(1)
  ROOT %c = (bf16[3,64,256]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%a, %b), custom_call_target="{target}", backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}}}}
}}
"""
    module = Module(text)
    assert module.flops(module.entry, module.entry["c"]) == 2 * 3 * 64 * 256 * 128


@pytest.mark.parametrize("kind, operands", [("Forward", "xwy"), ("BackwardInput", "ywx"), ("BackwardFilter", "xyw")])
def test_convolutions_by_cudnn(kind, operands):
    """A convolution and its gradients have the same products. Along an axis, four windows of 4 at a stride of 2 lie on 3, 4,
    4 and 3 values.
    """
    shapes = dict(x="bf16[2,8,8,3]", w="bf16[5,4,4,3]", y="bf16[2,4,4,5]")
    a, b, out = (shapes[name] for name in operands)
    text = f"""ENTRY %main (a: {a}, b: {b}) -> {out} {{
  %a = {a}{{3,2,1,0}} parameter(0)
  %b = {b}{{3,2,1,0}} parameter(1)
  ROOT %c = ({out}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), window={{size=4x4 stride=2x2 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{kind}"
}}
"""
    module = Module(text)
    assert module.flops(module.entry, module.entry["c"]) == 2 * 2 * 3 * 5 * (3 + 4 + 4 + 3) ** 2
