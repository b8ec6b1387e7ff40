"""Reads the text of an optimised XLA module: computations, instructions, shapes, trip counts, and FLOP of products."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

ARRAY = re.compile(r"\b(pred|token|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
# Bits of the types whose name does not say them; in other names they are the first number, as in bf16 or f8e4m3.
BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}

SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
CUDNN = re.compile(r"__cudnn\$fmha\w*")
CONVOLUTION = re.compile(r"__cudnn\$conv(Forward|BackwardInput|BackwardFilter|BiasActivationForward)")
CUBLAS = re.compile(r"__cublas\$(gemm|lt\$matmul)")
TRITON = re.compile(r"\bmha_(forward|backward)\b")

Dims = tuple[int, ...]


def require_match(pattern: str, text: str) -> re.Match[str]:
    """`re.search` for a pattern that the text must hold. Raises ValueError if it does not."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the XLA module holds no {pattern} in {text[:80]!r}")
    return match


@dataclass(frozen=True)
class Array:
    """An array's type; an instruction that makes a tuple has several."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> float:
        """Its size in bytes, in whichever memory it lies."""
        bits = BITS[self.dtype] if self.dtype in BITS else int(require_match(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits / 8

    @property
    def hbm(self) -> float:
        """Bytes in the chip's main memory: 0 in another memory space, such as S(1) for VMEM."""
        return 0.0 if re.search(r"S\([1-9]", self.layout) else self.bytes


@dataclass
class Instruction:
    """A line of a computation: name = shape opcode(inside), attributes."""

    name: str
    shape: str
    opcode: str
    operands: list[str]  # names of instructions
    inside: str  # the text between the opcode's parentheses
    attributes: str
    root: bool  # whether its value is the computation's

    @cached_property
    def arrays(self) -> list[Array]:
        """The arrays that it makes."""
        return [
            Array(kind, tuple(map(int, dims.split(","))) if dims else (), layout)
            for kind, dims, layout in ARRAY.findall(self.shape)
        ]

    @property
    def bytes(self) -> float:
        """Bytes of the arrays that it makes."""
        return sum(a.bytes for a in self.arrays)

    @property
    def hbm(self) -> float:
        """Bytes of them in the chip's main memory."""
        return sum(a.hbm for a in self.arrays)

    def attribute(self, name: str) -> str | None:
        """The value of `name=`: a computation's name, or the text between braces; None without that attribute."""
        value = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return None if value is None else value[1] if value[1] is not None else value[2]

    def required(self, name: str) -> str:
        """The value of an attribute that the instruction must have. Raises ValueError without it."""
        value = self.attribute(name)
        if value is None:
            raise ValueError(f"the instruction {self.name} ({self.opcode}) has no attribute {name}")
        return value


class Computation(dict):
    """Instructions by name, in the order of execution."""

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's."""
        return next(i for i in self.values() if i.root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters by number."""
        return sorted((i for i in self.values() if i.opcode == "parameter"), key=lambda i: int(i.inside))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use each name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.values():
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


class Module:
    """The `computations` by name; `entry` is the one that runs first."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        current = None
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = self.computations[header[2]] = Computation()
                if header[1]:
                    self.entry = current
            elif line.rstrip() == "}":  # an indented one belongs to attributes of several lines
                current = None
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    def called(self, instruction: Instruction, attribute: str = "calls") -> Computation:
        """The computation that an attribute of the instruction names."""
        return self.computations[instruction.required(attribute)]

    def trips(self, loop: Instruction, around: Computation) -> int | None:
        """How often a while loop's body runs; None if the text does not say it."""
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = self.called(loop, "condition"), self.called(loop, "body")
        test = self._through(condition, condition.root)
        if test is None or test.opcode != "compare":
            return None
        counter, bound = (self._through(condition, condition[o]) for o in test.operands)
        if counter is None or bound is None or counter.opcode != "get-tuple-element":
            return None
        index = int(counter.required("index"))
        last = self._constant(bound)
        first = self._constant(self._element(around, around[loop.operands[0]], index))
        step = self._step(body, index)
        if last is None or first is None or not step:
            return None
        further = test.attribute("direction") in ("LE", "GE")
        return max(0, math.ceil((last - first + (further if step > 0 else -further)) / step))

    def _through(self, computation: Computation, at: Instruction | None) -> Instruction | None:
        """The instruction behind copies, bitcasts and conversions."""
        while at is not None and at.opcode in ("copy", "bitcast", "convert"):
            at = computation.get(at.operands[0])
        return at

    def _element(self, computation: Computation, tupled: Instruction, index: int) -> Instruction | None:
        """The instruction that made element `index` of a tuple; None if `tupled` is no tuple instruction."""
        if tupled.opcode != "tuple":
            return None
        return self._through(computation, computation.get(tupled.operands[index]))

    def _constant(self, at: Instruction | None) -> int | None:
        """The value of an integer constant; None for any other instruction."""
        if at is None or at.opcode != "constant" or not re.fullmatch(r"-?\d+", at.inside):
            return None
        return int(at.inside)

    def _step(self, body: Computation, index: int) -> int | None:
        """The constant that a loop's body adds to element `index` of its state; None if it does something else."""
        new = self._element(body, body.root, index)
        if new is not None and new.opcode == "fusion":
            inner = self.called(new)
            new, body = self._through(inner, inner.root), inner
        if new is None or new.opcode != "add":
            return None
        return next(
            (c for o in new.operands if (c := self._constant(self._through(body, body.get(o)))) is not None), None
        )

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """FLOP of a product, of the products in a fusion, or of a kernel by its author's estimate; else 0."""
        if instruction.opcode == "dot":
            left = computation[instruction.operands[0]].arrays[0].dims
            contracted = [int(d) for d in (instruction.attribute("lhs_contracting_dims") or "").split(",") if d]
            return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[d] for d in contracted)
        if instruction.opcode == "convolution":
            left, right = (computation[o].arrays[0].dims for o in instruction.operands[:2])
            return convolution_flops(left, right, instruction.arrays[0].dims, instruction.attributes)
        if instruction.opcode == "fusion":
            inner = self.called(instruction)
            return sum(self.flops(inner, i) for i in inner.values())
        if instruction.opcode == "custom-call":
            operands = [computation[o].arrays[0] for o in instruction.operands]
            if splash := SPLASH.search(instruction.name + instruction.attributes):
                return _splash_flops(splash[1], operands)
            if CUDNN.search(instruction.attributes):
                return _cudnn_flops(operands, instruction.attributes)
            if convolution := CONVOLUTION.search(instruction.attributes):
                left, right = (a.dims for a in operands[:2])
                shapes = _forward(convolution[1], left, right, instruction.arrays[0].dims)
                return convolution_flops(*shapes, instruction.attributes)
            if CUBLAS.search(instruction.attributes):
                return _cublas_flops(operands[0], instruction.arrays[0], instruction.attributes)
            if triton := TRITON.search(instruction.attributes):
                return _triton_flops(triton[1], operands)
            said = re.search(r'cost_estimate\\?":\s*\{[^}]*?flops\\?":\s*\\?"?(\d+)', instruction.attributes)
            return float(said[1]) if said else 0.0
        return 0.0


def _splash_flops(kernel: str, operands: list[Array]) -> float:
    """FLOP of splash attention, which gives no estimate of its own; a causal mask leaves half of all pairs.

    Its operands begin with queries (..., H, S, K) and keys (..., J, C, K).
    """
    queries, keys = [a.dims for a in operands if len(a.dims) > 2 and a.dtype in ("bf16", "f32", "f16")][:2]
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kernel]
    return products * 2.0 * math.prod(queries) * keys[-2] / 2


def _cudnn_flops(operands: list[Array], attributes: str) -> float:
    """FLOP of cuDNN's attention, whose operands begin with queries (B, S, H, K) and keys (B, C, J, K).

    The backward pass computes the logits again, so it has five products instead of two. A causal mask leaves half of
    all pairs.
    """
    B, S, H, K = operands[0].dims
    products = 5 if "Backward" in require_match(CUDNN.pattern, attributes)[0] else 2
    return products * 2.0 * B * S * H * K * operands[1].dims[1] * (0.5 if "CAUSAL" in attributes else 1.0)


def _forward(kind: str, left: Dims, right: Dims, out: Dims) -> tuple[Dims, Dims, Dims]:
    """Shapes of the input, the filter and the output of the convolution that a kernel of cuDNN computes, or whose
    gradient it computes: attributes of the gradient's kernels are those of the convolution itself.
    """
    if kind == "BackwardInput":
        return out, right, left
    return (left, out, right) if kind == "BackwardFilter" else (left, right, out)


def _triton_flops(kernel: str, operands: list[Array]) -> float:
    """FLOP of JAX's attention in Triton, whose operands begin with queries (B, S, H, K) and keys (B, C, H, K).

    Its backward pass computes the logits and the gradients of the weights twice, so it has seven products. A causal
    mask leaves half of all pairs.
    """
    B, S, H, K = operands[0].dims
    return {"forward": 2, "backward": 7}[kernel] * 2.0 * B * S * H * K * operands[1].dims[1] / 2


def _cublas_flops(left: Array, out: Array, attributes: str) -> float:
    """FLOP of a matrix product by cuBLAS; the attributes name the axes of `left` that are summed over."""
    contracted = require_match(r'lhs_contracting_dimensions\\*":\[([^\]]*)\]', attributes)[1]
    return 2.0 * math.prod(out.dims) * math.prod(left.dims[int(d)] for d in re.findall(r"\d+", contracted))


def _instruction(line: str) -> Instruction | None:
    """The instruction in a line; None if the line has none."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    shape, rest = _leading(line[head.end() :])
    opcode = require_match(r"^\s*([\w\-]+)\(", rest)
    inside, attributes = _leading(rest[opcode.end() - 1 :])
    inside = inside[1:-1]
    operands = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(head[2], shape, opcode[1], operands, inside, attributes, bool(head[1]))


def _leading(text: str) -> tuple[str, str]:
    """A text's leading parenthesis, or else its leading word, and the rest. Raises ValueError for an unclosed one."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def convolution_flops(left: Dims, right: Dims, out: Dims, attributes: str) -> float:
    """FLOP of a convolution of these shapes, products with padding left out.

    The TPU's compiler writes every matrix product as a convolution, and a batch axis as a dilated axis of it.
    """
    spec = require_match(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    pairs = 1.0
    for axis in range(len(left) - 2):

        def field(name: str, default: object, axis: int = axis) -> Any:
            return fields[name].split("x")[axis] if name in fields else default

        size, stride = int(field("size", 1)), int(field("stride", 1))
        low = int(str(field("pad", "0_0")).split("_")[0])
        spread, holes = int(field("lhs_dilate", 1)), int(field("rhs_dilate", 1))
        extent = (left[spec[1].index(str(axis))] - 1) * spread + 1
        at = np.arange(out[spec[3].index(str(axis))])[:, None] * stride + np.arange(size) * holes - low
        pairs *= np.count_nonzero((at >= 0) & (at < extent) & (at % spread == 0))
    batch_groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = left[spec[1].index("b")] / (int(batch_groups[1]) if batch_groups else 1)
    return 2.0 * batch * right[spec[2].index("i")] * out[spec[3].index("f")] * pairs
