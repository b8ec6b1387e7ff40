"""Weight tables: which tensor of another project's checkpoint corresponds to which of our parameters.

A table is a sequence of rules. From it and the shapes of our parameters, `expected` lists every tensor that the
checkpoint must hold, with its name and shape. Import and export both follow this list.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from starflow2_jax.errors import UserError
from starflow2_jax.text_files import reason

SHOWN, SHOWN_OF_A_KIND = 20, 5  # largest number of faults in a message, in all and of one kind
FIELD = re.compile(r"\{(\w+)\}")


class WeightError(UserError):
    """Weights that cannot be read or do not fit the model. The message has the number of faults and the first ones."""


@dataclass(frozen=True)
class Rule:
    """One source tensor <-> one of our parameters, or several that the source concatenates along its first axis.

    source: the tensor's name with fields for numbers, as in "blocks.{block}.layers.{layer}.qkv.weight".
    target: the parameter's path with the same fields, as in "block_{block}/stack/layers/attention/query/kernel". A
    field
        that only the source has, at most one, is an index into the target's first axis: the layers of a scan.
    axes: the axes of source and target (without the axis of layers), as in "(h k) e -> e h k". "1" is an axis of size 1
        that the target does not have. None: both have the same axes.
    sizes: sizes of axes that appear only within groups, as in {"p": 14}; a missing one follows from the tensor's shape.
    """

    source: str
    target: str | tuple[str, ...]
    axes: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """The target or targets, as a tuple."""
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclass(frozen=True)
class Ignore:
    """Source tensors that are not imported, such as buffers: their whole name matches the regular expression
    `pattern`.
    """

    pattern: str


@dataclass(frozen=True)
class Part:
    """The parameter, or one layer of a parameter, that a piece of a source tensor fills."""

    path: str  # of the parameter
    layer: int | None  # index into the parameter's first axis; None: the whole parameter
    shape: tuple[int, ...]  # of the parameter or of its layer


Table = Sequence[Rule | Ignore]


class Head(NamedTuple):
    """The order of a head's channels in the source and in ours, as axes of a Rule. Rotary positions rotate pairs of
    them.
    """

    theirs: str
    ours: str
    sizes: Mapping[str, int]


HALVES = Head("k", "k", {})  # the source pairs channels (i, i + K/2), as we do
NEIGHBOURS = Head("pair side", "(side pair)", {"side": 2})  # the source pairs channels (2i, 2i + 1)


def linear(source: str, target: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a linear map, PyTorch's (out, in) -> ours (in, out), and its bias."""
    kernel = Rule(f"{source}.weight", f"{target}/kernel", "out in -> in out")
    return (kernel, Rule(f"{source}.bias", f"{target}/bias")) if bias else (kernel,)


def norm(source: str, target: str, bias: bool = True, head: Head = HALVES) -> tuple[Rule, ...]:
    """Rules of a norm's scale and bias. `head`: the order of channels, for a norm of the heads of queries or keys."""
    leaves = (("weight", "scale"), ("bias", "bias")) if bias else (("weight", "scale"),)
    axes = f"({head.theirs}) -> {head.ours}"
    return tuple(Rule(f"{source}.{theirs}", f"{target}/{ours}", axes, head.sizes) for theirs, ours in leaves)


def to_heads(source: str, target: str | tuple[str, ...], head: Head = HALVES) -> tuple[Rule, ...]:
    """Rules of a query, key or value map, (H K, E) -> (E, H, K), and its bias. Several targets: the source concatenates
    them.
    """
    targets = (target,) if isinstance(target, str) else target
    kernels, biases = (tuple(f"{t}/{leaf}" for t in targets) for leaf in ("kernel", "bias"))
    return (
        Rule(f"{source}.weight", kernels, f"(h {head.theirs}) e -> e h {head.ours}", head.sizes),
        Rule(f"{source}.bias", biases, f"(h {head.theirs}) -> h {head.ours}", head.sizes),
    )


def from_heads(source: str, target: str, bias: bool = True, head: Head = HALVES) -> tuple[Rule, ...]:
    """Rules of attention's output map, (E, H K) -> (H, K, E), and its bias."""
    kernel = Rule(f"{source}.weight", f"{target}/kernel", f"e (h {head.theirs}) -> h {head.ours} e", head.sizes)
    return (kernel, Rule(f"{source}.bias", f"{target}/bias")) if bias else (kernel,)


def expected(table: Table, tree: Mapping) -> tuple[dict[str, tuple[Rule, tuple[Part, ...]]], list[str]]:
    """The source tensors that fill `tree` (nested dicts of arrays or shapes), and the faults of the table.

    The first result maps a tensor's name to its rule and the parts of `tree` that it fills. The second has one sentence
    for each parameter that no rule or two rules fill, and for each tensor that two rules name.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    shapes = {path: tuple(x.shape) for path, x in leaves.items()}
    wanted, faults, filled = {}, [], {}
    for rule in (r for r in table if isinstance(r, Rule)):
        stacked = set(FIELD.findall(rule.source)) - set(FIELD.findall(rule.targets[0]))
        pattern = _compile(rule.targets[0])
        for match in filter(None, map(pattern.fullmatch, shapes)):
            paths = [target.format(**match.groupdict()) for target in rule.targets]
            if absent := [path for path in paths if path not in shapes]:
                faults.append(f"rule {rule.source}: the model has {paths[0]} but no {', '.join(absent)}")
                continue
            for path in paths:
                if filled.setdefault(path, rule) is not rule:
                    faults.append(f"parameter {path} is filled by two rules, {filled[path].source} and {rule.source}")
            for layer in range(shapes[paths[0]][0]) if stacked else (None,):
                name = rule.source.format(**match.groupdict(), **dict.fromkeys(stacked, layer))
                parts = tuple(Part(p, layer, shapes[p] if layer is None else shapes[p][1:]) for p in paths)
                if name in wanted:
                    faults.append(f"tensor {name} belongs to two rules, {wanted[name][0].target} and {rule.target}")
                wanted[name] = rule, parts
    faults += [f"parameter {path} {shape} is filled by no rule" for path, shape in shapes.items() if path not in filled]
    return wanted, faults


def import_tensors(table: Table, tensors: Mapping[str, np.ndarray], tree: Mapping) -> dict:
    """The tensors of a checkpoint as our parameters: nested dicts of NumPy arrays with the shapes and types of `tree`.

    Raises WeightError unless each tensor belongs to exactly one rule, each parameter is filled, all shapes fit and all
    numbers are finite.
    """
    wanted, faults = expected(table, tree)
    faults += name_faults(table, wanted, tensors, lambda name: np.shape(tensors[name]))
    abstract: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    out = {path: np.empty(x.shape, x.dtype) for path, x in abstract.items()}
    for name, (rule, parts) in wanted.items():
        if name not in tensors:
            continue
        value = np.asarray(tensors[name])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            faults.append(f"tensor {name} holds {value.dtype}, not floating point numbers")
            continue
        if not np.isfinite(value).all():
            faults.append(f"tensor {name} has {np.count_nonzero(~np.isfinite(value))} numbers that are not finite")
        if fault := shape_fault(rule, parts, value.shape):
            faults.append(f"tensor {name} {fault}")
            continue
        for part, piece in zip(parts, cut(rule, parts, value), strict=True):
            out[part.path][() if part.layer is None else part.layer] = piece
    refuse(faults)
    return traverse_util.unflatten_dict(out, sep="/")


def refuse(faults: Sequence[str]) -> None:
    """Raises WeightError if there are faults, with their number and the first of each kind. A fault's first word is its
    kind.
    """
    if not faults:
        return
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.split()[0], []).append(fault)
    shown = [fault for kind in kinds.values() for fault in kind[:SHOWN_OF_A_KIND]][:SHOWN]
    lines = [f"the weights do not fit ({len(faults)} faults):", *(f"- {fault}" for fault in shown)]
    if hidden := len(faults) - len(shown):
        lines.append(f"- and {hidden} more")
    raise WeightError("\n".join(lines))


def name_faults(table: Table, wanted: Mapping, names: Collection[str], shape_of: Callable) -> list[str]:
    """One sentence for each tensor that a checkpoint lacks, or has without need.

    names: of the checkpoint's tensors. wanted: the result of `expected`. shape_of: name -> shape, for the sentences.
    """
    faults = []
    ignored = [re.compile(rule.pattern) for rule in table if isinstance(rule, Ignore)]
    for name in names:
        ignores = any(pattern.fullmatch(name) for pattern in ignored)
        if name in wanted and ignores:
            faults.append(f"tensor {name} belongs to a rule, but another rule says to ignore it")
        elif name not in wanted and not ignores:
            faults.append(f"unexpected tensor {name} {tuple(shape_of(name))}")
    for name, (_, parts) in wanted.items():
        if name not in names:
            faults.append(f"missing tensor {name}, of {', '.join(part.path for part in parts)}")
    return faults


def _compile(template: str) -> re.Pattern:
    """A pattern that matches a template with {fields}; each field matches digits, as a group of the same name."""
    pieces = re.split(r"(\{\w+\})", template)
    return re.compile("".join(f"(?P<{p[1:-1]}>\\d+)" if FIELD.fullmatch(p) else re.escape(p) for p in pieces))


def _groups(side: str) -> list[list[str]]:
    """The names in each axis of one side of Rule.axes: "(h k) e" -> [[h, k], [e]]."""
    return [(group or name).split() for group, name in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def source_shape(rule: Rule, parts: Sequence[Part], given: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The shape that the source tensor of `parts` must have. `given`: its actual shape, for sizes that nothing else
    fixes.
    """
    shapes = [_plan(rule, given, part.shape)[0] for part in parts]
    return shapes[0] if len(parts) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def shape_fault(rule: Rule, parts: Sequence[Part], shape: tuple[int, ...]) -> str:
    """How a source tensor's shape differs from the expected one; empty if it does not."""
    want = source_shape(rule, parts, shape)
    same_size = math.prod(shape) == sum(math.prod(part.shape) for part in parts)
    same_rest = all(_plan(rule, shape, part.shape)[0][1:] == want[1:] for part in parts)
    return "" if shape == want and same_size and same_rest else f"has shape {shape} where {want} is expected"


def cut(rule: Rule, parts: Sequence[Part], value: np.ndarray) -> list[np.ndarray]:
    """Cut a source tensor of the right shape into the pieces that fill `parts`. They are views if possible."""
    pieces, start = [], 0
    for part in parts:
        shape, split, order = _plan(rule, value.shape, part.shape)
        piece = value[start : start + shape[0]] if len(parts) > 1 else value
        pieces.append(piece.reshape(split).transpose(order).reshape(part.shape))
        start += shape[0] if shape else 0
    return pieces


def join(rule: Rule, parts: Sequence[Part], pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `cut`: the source tensor, made of the pieces that fill `parts`."""
    whole = []
    for part, piece in zip(parts, pieces, strict=True):
        shape, split, order = _plan(rule, (), part.shape)
        whole.append(piece.reshape([split[i] for i in order]).transpose(np.argsort(order)).reshape(shape))
    return whole[0] if len(whole) == 1 else np.concatenate(whole)


def _plan(rule: Rule, source: tuple[int, ...], target: tuple[int, ...]) -> tuple[tuple, list, list]:
    """How a source tensor becomes a piece of shape `target`: its own shape, its shape with the groups split into axes,
    and the permutation of these axes.

    Sizes come from `target`. Sizes of axes that `target` has only within a group come from the rule, or from the source
    tensor's shape, `source`.
    """
    if rule.axes is None:
        return target, list(target), list(range(len(target)))
    left, right = (_groups(side) for side in rule.axes.split("->"))
    if len(right) != len(target):
        raise ValueError(f"axes {rule.axes!r} do not describe a parameter of shape {target}")
    sizes = {"1": 1, **rule.sizes} | {g[0]: n for g, n in zip(right, target, strict=True) if len(g) == 1}
    for group, size in zip(left, source, strict=False):
        if len(group) == 1:
            sizes.setdefault(group[0], size)
    for group, size in zip(right, target, strict=True):  # a grouped axis of the target fixes its one unknown size
        if len(group) > 1:
            free = next((name for name in group if name not in sizes), group[0])
            sizes[free] = size // math.prod(max(sizes[name], 1) for name in group if name != free)
    names = [name for group in left for name in group if name != "1"]
    shape = tuple(math.prod(sizes.get(name, 1) for name in group) for group in left)
    return shape, [sizes.get(name, 1) for name in names], [names.index(name) for group in right for name in group]


def read_tensors(path: str | Path) -> Mapping[str, np.ndarray]:
    """The arrays of a .npz, .safetensors, .pt or .pth file by name. Never unpickles. Raises WeightError.

    If a .npz file has names "param/...", only these arrays are returned, without this prefix. A .safetensors file is
    read tensor by tensor, on access.
    """
    path = Path(path)
    reader = {".npz": _read_npz, ".safetensors": _Safetensors, ".pt": _read_torch, ".pth": _read_torch}.get(path.suffix)
    if reader is None:
        raise WeightError(f"{path} is no .npz, .safetensors, .pt or .pth file; convert it to one of these")
    if not path.is_file():
        raise WeightError(f"there is no file {path}")
    return reader(path)


def _unreadable(path: Path, error: Exception) -> WeightError:
    return WeightError(f"{path} cannot be read: {reason(error)}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            prefixed = [name for name in file.files if name.startswith("param/")]
            return {name.removeprefix("param/"): file[name] for name in prefixed or file.files}
    except Exception as e:  # NumPy and zipfile raise many kinds of errors for a damaged file
        raise _unreadable(path, e) from e


class _Safetensors(Mapping):
    """The tensors of a .safetensors file, each read on access."""

    def __init__(self, path: Path):
        try:
            self._file = safetensors.safe_open(path, "np")
        except (OSError, safetensors.SafetensorError) as e:
            raise _unreadable(path, e) from e
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as e:
        raise WeightError(f"{path} needs PyTorch to read: pip install 'starflow2_jax[torch]'") from e
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds of errors for a damaged file
        raise WeightError(
            f"{path} cannot be read: it is damaged or holds objects other than tensors, which are never unpickled "
            f"here; save its tensors as .safetensors"
        ) from e
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightError(f"{path} does not hold a flat dictionary of tensors; save its state_dict alone")
    wide = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in state.items()}
    return {name: value.numpy() for name, value in wide.items()}
