"""Costs of a compiled module on a chip: FLOP, bytes moved, collectives, and its time as the roofline predicts it."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from starflow2_jax.parallel.hardware import Topology
from starflow2_jax.planning.hlo import Computation, Instruction, Module, require_match

ROOFLINE = (
    "operations run one after another, each for the longer of its FLOP at the matrix units' peak and its bytes at "
    "the memory's; collectives run one after another, each for the bytes that a ring algorithm sends at the "
    "bandwidth of the links of its axis, and cost only the time in which no computation runs beside them. Left out: "
    "latencies, the units' inefficiency on odd shapes, vector arithmetic, congestion, the host and the input"
)

# Seconds of real training steps on NVIDIA GPUs / seconds predicted by `ROOFLINE`: the least and the most that were
# found.
MARGIN = (1.16, 1.53)
MEASURED = (
    f"real training steps took {MARGIN[0]} to {MARGIN[1]} times the predicted seconds: 1.38 and 1.41 on one H200 "
    f"(stages 1 and 3 of 7B), and 1.38, 1.34, 1.16 and 1.53 in MosaicML's published runs of MPT, 7B on 8 H100, 13B on "
    f"64 H100, 7B on 8 A100 and 7B on 64 A100 (docs/benchmarks/gpu.md)"
)
NOT_COMPARED = "no real step of this kind on such a chip was compared with a prediction"

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
# Operations that do no work: they name values or set memory aside.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id", "after-all"),
    *("copy-done", "slice-done", "async-update", "domain", "opt-barrier", "optimization-barrier", "add-dependency"),
    *("send", "send-done", "recv", "recv-done"),
}
# Libtpu writes a collective between slices as a `send` to the host, with these marks, and a `recv` of the same name.
BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
MEETING = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')
IOTA = r"(\[[\d,]+\])(?:T\(([\d,]+)\))?"  # XLA's notation of an order of partitions: [4,16]T(1,0)
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")


@dataclass
class Collective:
    """One kind of transfer on one mesh axis: the sum of its executions in a step, per chip."""

    kind: str
    axis: str
    count: float = 0
    bytes: float = 0  # sent by a chip
    seconds: float = 0
    overlapped: float = 0  # seconds hidden behind computation
    started: float = 0  # asynchronous executions


@dataclass
class Costs:
    """Costs of one execution on one chip."""

    flops: float = 0
    bytes: float = 0  # to and from HBM
    seconds: float = 0  # predicted by `ROOFLINE`
    matrix_seconds: float = 0  # of the FLOP alone, at the matrix units' peak
    exposed: float = 0  # seconds spent waiting for the interconnect
    collectives: dict[tuple[str, str], Collective] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # loops of unknown trip count, counted as one turn
    slowest: dict[str, float] = field(default_factory=dict)  # seconds by operation of the source program


class Analysis:
    """Walks a module in the order of execution with three clocks: of the chip, of its links, of the network between
    slices.

    mesh: sizes by axis. coordinates (chips, dimensions): place in the torus of each partition's chip. The result is
    `costs`.
    """

    def __init__(self, module: Module, topology: Topology, mesh: dict[str, int], coordinates: np.ndarray):
        self.module, self.topology, self.mesh, self.coordinates = module, topology, mesh, coordinates
        self.costs = Costs()
        self.costs.seconds = self._run(module.entry, 1.0)
        self.costs.seconds = max(self.costs.seconds, self.costs.bytes / topology.chip.bandwidth)

    def _run(self, computation: Computation, times: float) -> float:
        """Seconds of one execution of a computation; adds the costs of `times` executions."""
        clocks = [0.0, 0.0, 0.0]  # of the chip, of its links, of the network
        pending: dict[str, tuple[float, float, Collective]] = {}
        for at in computation.values():
            base = at.opcode.removesuffix("-start").removesuffix("-done")
            inner = self._wrapped(at) if at.opcode == "async-start" else None
            moved = (
                inner if inner else (computation, at) if base in COLLECTIVES and at.opcode != base + "-done" else None
            )
            if at.opcode == "while":
                clocks[0] += self._loop(computation, at, times)
            elif at.opcode in ("call", "conditional"):
                clocks[0] += max(self._run(c, times) for c in self._branches(at))
            elif moved:
                kind, seconds = self._collective(*moved, times)
                clocks[1] = max(clocks[:2]) + seconds
                if at.opcode.endswith("-start"):
                    pending[at.name] = clocks[1], seconds, kind
                    kind.started += times
                else:
                    self.costs.exposed += times * (clocks[1] - clocks[0])
                    clocks[0] = clocks[1]
            elif at.opcode == "send" and (transfer := BETWEEN.search(at.attributes)):
                kind, seconds = self._between_slices(transfer[1], computation[at.operands[0]].bytes, times)
                clocks[2] = max(clocks[0], clocks[2]) + seconds
                pending[require_match(MEETING.pattern, at.attributes)[1]] = clocks[2], seconds, kind
            elif at.opcode == "recv-done" and (first := self._meeting(computation, at)) in pending:
                end, seconds, kind = pending.pop(first)
                clocks[0] = self._wait(clocks[0], end, seconds, kind, times)
            elif at.opcode.endswith("-done") and (first := self._first(computation, at)) in pending:
                end, seconds, kind = pending.pop(first)
                clocks[0] = self._wait(clocks[0], end, seconds, kind, times)
            elif at.opcode not in FREE:
                self._fused(computation, at, clocks, pending, times)
        return clocks[0]

    def _fused(self, around: Computation, at: Instruction, clocks: list[float], pending: dict, times: float) -> None:
        """Advance both clocks by an operation that computes, and by the collectives that are fused into it.

        The TPU's compiler may split a collective over fusions: one starts it, others compute while it runs, one ends
        it, and all carry the number of its channel. A collective within a single fusion overlaps with that one alone.
        """
        begin = clocks[0]
        clocks[0] += self._compute(around, at, times)
        for computation, collective in self._collectives_in(at):
            marks = {i.attributes.partition('custom_call_target="')[2].partition('"')[0] for i in computation.values()}
            channel = re.search(r"channel_id=(\d+)", collective.attributes)
            name = f"channel {channel[1]}" if channel else at.name
            if name not in pending:
                kind, seconds = self._collective(computation, collective, times, fused=True)
                kind.started += times
                clocks[1] = max(begin, clocks[1]) + seconds
                pending[name] = clocks[1], seconds, kind
                last = not marks & {"AsyncCollectiveStart"}
            else:
                last = "AsyncCollectiveDone" in marks
            if last:
                end, seconds, kind = pending.pop(name)
                clocks[0] = self._wait(clocks[0], end, seconds, kind, times)

    def _wait(self, now: float, end: float, seconds: float, kind: Collective, times: float) -> float:
        """The time at which an operation that waits from `now` for a collective until `end` may proceed."""
        wait = max(0.0, end - now)
        kind.overlapped += times * max(0.0, seconds - wait)
        self.costs.exposed += times * wait
        return now + wait

    def _collectives_in(self, at: Instruction) -> list[tuple[Computation, Instruction]]:
        """The collectives in a fusion and in the fusions within it, each with its computation."""
        if at.opcode != "fusion":
            return []
        inner = self.module.called(at)
        here = [(inner, i) for i in inner.values() if i.opcode.removesuffix("-start") in COLLECTIVES]
        return here + [found for i in inner.values() for found in self._collectives_in(i)]

    def _loop(self, computation: Computation, at: Instruction, times: float) -> float:
        """Seconds of a while loop."""
        trips = self.module.trips(at, computation)
        if trips is None:
            self.costs.unknown.append(at.name)
        trips = 1 if trips is None else trips
        return trips * self._run(self.module.called(at, "body"), times * trips) if trips else 0.0

    def _branches(self, at: Instruction) -> list[Computation]:
        """The computation that a call runs; for a conditional, its branch with the most FLOP in products."""
        if at.opcode == "call":
            return [self.module.called(at, "to_apply")]
        listed = at.attribute("branch_computations")
        names = (
            re.findall(r"[\w.\-]+", listed) if listed else [at.required(f"{b}_computation") for b in ("true", "false")]
        )
        branches = [self.module.computations[n] for n in names]
        return [max(branches, key=lambda c: (sum(self.module.flops(c, i) for i in c.values()), len(c)))]

    def _wrapped(self, at: Instruction) -> tuple[Computation, Instruction] | None:
        """The collective inside an async-start, with its computation."""
        inner = self.module.called(at)
        return next(((inner, i) for i in inner.values() if i.opcode in COLLECTIVES), None)

    def _first(self, computation: Computation, done: Instruction) -> str:
        """The name of the start that a -done belongs to."""
        return self._start(computation, done).name

    def _start(self, computation: Computation, done: Instruction) -> Instruction:
        at = computation[done.operands[0]]
        while at.opcode == "async-update":
            at = computation[at.operands[0]]
        return at

    def _meeting(self, computation: Computation, done: Instruction) -> str:
        """The name by which a recv-done and a send belong together; "" without one."""
        found = MEETING.search(self._start(computation, done).attributes)
        return found[1] if found else ""

    def _between_slices(self, transfer: str, size: float, times: float) -> tuple[Collective, float]:
        """Add `times` executions of a collective of all slices, to which a chip brings `size` bytes, to the costs; as
        `_collective`.
        """
        n, base = self.topology.slices, transfer.lower().replace("_", "-")
        sent = size * {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}.get(base, (n - 1) / n)
        kind = self._add(base, "slices", sent, sent / self.topology.chip.network, times)
        kind.started += times
        return kind, sent / self.topology.chip.network

    def _compute(self, computation: Computation, at: Instruction, times: float) -> float:
        """Seconds of one execution of an operation; adds `times` executions to the costs."""
        if at.opcode == "custom-call" and any(f'custom_call_target="{name}"' in at.attributes for name in FREE_CALLS):
            return 0.0
        chip = self.topology.chip
        flops, size = self.module.flops(computation, at), self._bytes(computation, at)
        self.costs.flops += times * flops
        self.costs.bytes += times * size
        self.costs.matrix_seconds += times * flops / chip.flops
        if at.opcode in ("copy-start", "slice-start"):  # runs beside computation; only the total of bytes bounds it
            return 0.0
        seconds = max(flops / chip.flops, size / chip.bandwidth)
        found = re.search(r'op_name="([^"]*)"', at.attributes)
        name = found[1] if found else at.opcode
        self.costs.slowest[name] = self.costs.slowest.get(name, 0.0) + times * seconds
        return seconds

    def _bytes(self, computation: Computation, at: Instruction) -> float:
        """HBM bytes that an operation reads and writes; a slice or an update in place counts as the piece alone."""
        if at.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
            return 2 * at.arrays[-2 if at.opcode == "slice-start" else 0].hbm
        if at.opcode == "copy-start":
            return max(a.bytes for a in at.arrays)  # between HBM and another memory
        if at.opcode == "dynamic-update-slice":
            return 2 * computation[at.operands[1]].hbm
        if at.opcode != "fusion":
            return at.hbm + sum(computation[o].hbm for o in at.operands)
        inner = self.module.called(at)
        read = sum(
            min(computation[o].hbm, self._read(inner, p))
            for o, p in zip(at.operands, inner.parameters, strict=True)
            if computation[o].hbm
        )
        return read + min(at.hbm, self._written(inner, inner.root))

    def _read(self, inner: Computation, parameter: Instruction) -> float:
        """Bytes that a fusion reads of one of its parameters."""
        total = 0.0
        for user in inner.users.get(parameter.name, []):
            if user.opcode == "tuple" or _moves(user):
                continue  # passed on unread, or read by the links
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue  # written in place
            elif user.opcode == "bitcast":
                total += self._read(inner, user)
            elif user.opcode == "fusion":
                nested = self.module.called(user)
                places = [i for i, o in enumerate(user.operands) if o == parameter.name]
                total += sum(self._read(nested, nested.parameters[i]) for i in places)
            else:
                return parameter.bytes
        return total

    def _written(self, inner: Computation, root: Instruction) -> float:
        """Bytes of its result that a fusion writes."""
        if root.opcode == "parameter" or _moves(root):
            return 0.0
        if root.opcode == "tuple":
            return sum(self._written(inner, inner[o]) for o in root.operands)
        if root.opcode == "bitcast" and root.operands[0] in inner:
            return self._written(inner, inner[root.operands[0]])
        return inner[root.operands[1]].bytes if root.opcode == "dynamic-update-slice" else root.bytes

    def _collective(
        self, computation: Computation, at: Instruction, times: float, fused: bool = False
    ) -> tuple[Collective, float]:
        """Add `times` executions of a collective to the costs; its entry there, and the seconds of one execution.

        The TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and slices.
        """
        base = at.opcode.removesuffix("-start")
        if fused and base == "all-reduce" and _only_slices(computation, at):
            base = "reduce-scatter"
        group = first_group(at.attributes, len(self.coordinates))
        size = self._payload(computation, at, base)
        n = len(group)
        sent = size * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(base, (n - 1) / n)
        seconds = sent / self.topology.send_rate(self.coordinates[group], base == "collective-permute")
        kind = self._add(base, self._axis(group), sent, seconds, times)
        self.costs.bytes += times * size * (1 + (1 / n if base in ("all-gather", "reduce-scatter") else 1))
        return kind, seconds

    def _add(self, base: str, axis: str, sent: float, seconds: float, times: float) -> Collective:
        """Add `times` executions of a collective to its entry in the costs, which is returned."""
        kind = self.costs.collectives.setdefault((base, axis), Collective(base, axis))
        kind.count += times
        kind.bytes += times * sent
        kind.seconds += times * seconds
        return kind

    def _payload(self, computation: Computation, at: Instruction, base: str) -> float:
        """Bytes of the whole array that a group gathers or reduces."""
        given = sum(computation[o].bytes for o in at.operands)
        if base != "all-gather":
            return given
        return max(given, at.bytes - (given if at.opcode.endswith("-start") else 0))

    def _axis(self, group: list[int]) -> str:
        """The mesh axes that the chips of a group differ in."""
        places = np.array(np.unravel_index(group, tuple(self.mesh.values()))).T
        return "+".join(a for a, column in zip(self.mesh, places.T, strict=True) if len(set(column)) > 1) or "one chip"


def _only_slices(computation: Computation, at: Instruction) -> bool:
    """Whether a computation uses slices of an instruction's arrays, and nothing else of them."""
    users = computation.users.get(at.name, [])
    return bool(users) and all(
        i.opcode == "dynamic-slice" or (i.opcode in ("get-tuple-element", "bitcast") and _only_slices(computation, i))
        for i in users
    )


def _moves(at: Instruction) -> bool:
    """Whether an instruction in a fusion is a collective, or a mark where an asynchronous one begins or ends."""
    return at.opcode.removesuffix("-start") in COLLECTIVES or "AsyncCollective" in at.attributes


def first_group(attributes: str, chips: int) -> list[int]:
    """The partitions of a collective's first group, in any of XLA's notations; all partitions if it names no groups."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return _cycle([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(i) for i in listed[1].split(",")]
    if iota := re.search(rf"replica_groups=(\[[\d,]+\])<={IOTA}", attributes):
        return _iota(*iota.groups()[1:]).reshape(_numbers(iota[1]))[0].tolist()
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))?\s*\{{([^}}]*)\}}", attributes):
        axes, *order, used = named.groups()
        group = np.array(_named(axes, used))
        return (_iota(*order).reshape(-1)[group] if order[0] else group).tolist()
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"the XLA module has groups in an unknown notation: {attributes[:200]}")
    return list(range(chips))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """The partitions in the order of [4,16]T(1,0): counted in an array of these sizes, which is then transposed."""
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _cycle(pairs: list[tuple[int, int]]) -> list[int]:
    """The chips that a permutation passes the data of one chip along: the first chip that does not keep its own."""
    target = dict(pairs)
    group = [next((a for a, b in pairs if a != b), pairs[0][0])]
    while (following := target.get(group[-1])) is not None and following not in group:
        group.append(following)
    return group


def _named(axes: str, used: str) -> list[int]:
    """The group of mesh['a'=16,'b'=2] {'a'}: partitions that differ in axis a alone. 'a':(4)2 is a part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    found = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    parts = {name: (int(before), int(size)) if before else None for name, before, size in found}
    index: list = []
    for name, size in sizes.items():
        part = parts.get(name, (size, 1))
        stride = 1 if part is None else size // math.prod(part)
        index.append(slice(None) if part is None else slice(0, part[1] * stride, stride))
    return ids[tuple(index)].reshape(-1).tolist()
