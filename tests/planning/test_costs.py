"""Bytes, collectives and the two clocks, on small programs and texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.hardware import CHIPS, GPUS, Topology
from starflow2_jax.planning.costs import Analysis, first_group
from starflow2_jax.planning.hlo import Module

FLAT = Topology(CHIPS["v5e"], (2, 4))
PLACES = np.array(np.unravel_index(np.arange(8), FLAT.shape)).T


def analyse(text: str, mesh: dict[str, int]):
    return Analysis(Module(text), FLAT, mesh, PLACES).costs


def test_collectives_of_a_scan_by_axis():
    """Two axes: sums over each, in a scan of three turns; the bytes of a ring all-reduce."""
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def body(x, w):
        def turn(x, _):
            y = jax.lax.psum(x * 2, "fsdp")
            return x + y, jax.lax.psum(jnp.sum(y), "data")

        return jax.lax.scan(turn, x, None, length=3)[0]

    function = jax.shard_map(body, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), check_vma=False)
    x = jax.ShapeDtypeStruct((4, 1000), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    compiled = jax.jit(function).lower(x, x).compile()
    costs = analyse(compiled.as_text(), dict(mesh.shape))
    summed = costs.collectives["all-reduce", "fsdp"]
    assert summed.count == 3
    assert summed.bytes == pytest.approx(3 * 2 * 3 / 4 * 1000 * 4)
    assert summed.overlapped == 0 and costs.exposed >= summed.seconds > 0


@pytest.mark.parametrize(
    "written, group",
    [
        ("replica_groups={{1,5},{0,4}}", [1, 5]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5}}", [0, 1, 2, 3]),
        ("source_target_pairs={{0,0},{2,1},{1,2},{3,3}}", [2, 1]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_as_they_are_written(written, group):
    assert first_group(f"channel_id=1, {written}, use_global_device_ids=true", 8) == group


def test_groups_in_a_notation_that_is_not_known():
    with pytest.raises(ValueError, match="unknown notation"):
        first_group("channel_id=1, replica_groups=mesh['a'=2,'b'=4], device_ids=(3,1,2,0) {'b'}", 8)


def overlap(between: str) -> str:
    """A gathering of 8 x 1 MiB over all chips, with something between its start and its end."""
    return f"""HloModule m, is_scheduled=true

ENTRY %main (a: bf16[512,1024], b: bf16[4096,4096]) -> bf16[4096,1024] {{
  %a = bf16[512,1024]{{1,0}} parameter(0)
  %b = bf16[4096,4096]{{1,0}} parameter(1)
  %s = (bf16[512,1024]{{1,0}}, bf16[4096,1024]{{1,0}}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={{0}}
{between}
  ROOT %d = bf16[4096,1024]{{1,0}} all-gather-done(%s)
}}
"""


def test_an_overlapped_collective_costs_what_is_left_of_it():
    dot = "  %c{} = bf16[4096,4096]{{1,0}} dot(%b, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    mesh = {"data": 1, "fsdp": 8}
    alone = analyse(overlap(""), mesh)
    gathering = alone.collectives["all-gather", "fsdp"]
    sent = 7 * 512 * 1024 * 2
    assert gathering.bytes == sent
    assert alone.seconds == alone.exposed == gathering.seconds == sent / (2 * CHIPS["v5e"].link)  # two open dimensions
    assert gathering.overlapped == 0

    one = analyse(overlap(dot.format(0)), mesh)  # 0.7 ms of products, longer than the gathering's 0.07
    products = 2 * 4096**3 / CHIPS["v5e"].flops
    assert one.flops == 2 * 4096**3 and one.exposed == 0
    assert one.seconds == pytest.approx(products)
    assert one.collectives["all-gather", "fsdp"].overlapped == pytest.approx(gathering.seconds)


def test_collectives_between_slices_run_beside_computation_and_links():
    """A chip's 8 MiB are summed over four slices while it gathers within its own; the sum is awaited last."""
    mark = '_xla_host_transfer_rendezvous="all-reduce.7"'
    summed = "f32[2048,1024]{1,0}"
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: f32[2048,1024], b: bf16[512,1024]) -> f32[2048,1024] {{
  %a = {summed} parameter(0)
  %b = bf16[512,1024]{{1,0}} parameter(1)
  %t = token[] after-all()
  %s = ({summed}, u32[], token[]) send(%a, %t), is_host_transfer=true, frontend_attributes={{{mark},_xla_megascale_transfer_type="ALL_REDUCE"}}
  %r = ({summed}, u32[], token[]) recv(%t), is_host_transfer=true, frontend_attributes={{{mark}}}
  %g = bf16[4096,1024]{{1,0}} all-gather(%b), replica_groups=[1,8]<=[8], dimensions={{0}}
  %sd = token[] send-done(%s)
  %rd = ({summed}, token[]) recv-done(%r)
  ROOT %x = {summed} get-tuple-element(%rd), index=0
}}
"""
    four = Topology(CHIPS["v5e"], (2, 4), slices=4)
    costs = Analysis(Module(text), four, {"data": 4, "fsdp": 8}, np.tile(PLACES, (4, 1))).costs
    between, within = (costs.collectives[key] for key in (("all-reduce", "slices"), ("all-gather", "fsdp")))
    assert between.bytes == 2 * 3 / 4 * 2048 * 1024 * 4
    assert between.seconds == pytest.approx(between.bytes / 3.125e9)
    assert between.started == 1 and between.overlapped == pytest.approx(within.seconds)
    assert costs.seconds == pytest.approx(between.seconds)


@pytest.mark.parametrize(
    "groups, shape, links",
    (
        ("[16,16]<=[256]", (16, 16), 2),  # a row of the torus: a ring
        ("[16,16]<=[16,16]T(1,0)", (16, 16), 2),  # a column
        ("[64,4]<=[256]", (16, 16), 1),  # four neighbours in a row: no link leads from the last to the first
        ("[64,4]<=[4,4,16]T(0,2,1)", (16, 16), 1),  # in a column
        ("[1,256]<=[256]", (16, 16), 4),
        ("[16,16]<=[4,4,4,4]T(0,2,1,3)", (16, 16), 2),  # a square of four by four
        ("[2,128]<=[256]", (16, 16), 3),  # eight rows: rings along one dimension, lines along the other
        ("[1,8]<=[8]", (2, 4), 2),  # two open dimensions
    ),
)
def test_links_that_a_group_sends_over(groups, shape, links):
    """An all-gather of 1 MiB in all; partitions lie in the order of the torus."""
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: bf16[1024,512]) -> bf16[1024,512] {{
  %a = bf16[1024,512]{{1,0}} parameter(0)
  ROOT %s = bf16[1024,512]{{1,0}} all-gather(%a), replica_groups={groups}, dimensions={{0}}
}}
"""
    topology, chips = Topology(CHIPS["v5e"], shape), np.prod(shape)
    places = np.array(np.unravel_index(np.arange(chips), shape)).T
    costs = Analysis(Module(text), topology, {"fsdp": int(chips)}, places).costs
    [gathering] = costs.collectives.values()
    assert gathering.bytes / gathering.seconds == pytest.approx(links * CHIPS["v5e"].link)


@pytest.mark.parametrize(
    "groups, rate",
    (
        ("[8,8]<=[64]", 450e9),  # within a node: NVLink
        ("[1,64]<=[64]", 400e9),  # all: eight adapters of 50 GB/s a node carry what the node must hear
        ("[8,8]<=[8,8]T(1,0)", 50e9),  # one GPU of each node: its own adapter
        ("[2,32]<=[8,2,4]T(1,0,2)", 200e9),  # half of each node
    ),
)
def test_rates_between_gpus(groups, rate):
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: bf16[1024,512]) -> bf16[1024,512] {{
  %a = bf16[1024,512]{{1,0}} parameter(0)
  ROOT %s = bf16[1024,512]{{1,0}} all-gather(%a), replica_groups={groups}, dimensions={{0}}
}}
"""
    topology = Topology(GPUS["h100"], (8, 8))
    places = np.array(np.unravel_index(np.arange(64), (8, 8))).T
    [gathering] = Analysis(Module(text), topology, {"fsdp": 64}, places).costs.collectives.values()
    assert gathering.bytes / gathering.seconds == pytest.approx(rate)


def test_a_collective_fused_with_products_runs_beside_them():
    text = """HloModule m, is_scheduled=true

%both (p: bf16[512,1024], q: bf16[4096,4096]) -> (bf16[4096,1024], bf16[4096,4096]) {
  %p = bf16[512,1024]{1,0} parameter(0)
  %q = bf16[4096,4096]{1,0} parameter(1)
  %g = bf16[4096,1024]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %d = bf16[4096,4096]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[4096,1024]{1,0}, bf16[4096,4096]{1,0}) tuple(%g, %d)
}

ENTRY %main (a: bf16[512,1024], b: bf16[4096,4096]) -> (bf16[4096,1024], bf16[4096,4096]) {
  %a = bf16[512,1024]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  ROOT %f = (bf16[4096,1024]{1,0}, bf16[4096,4096]{1,0}) fusion(%a, %b), kind=kCustom, calls=%both
}
"""
    costs = analyse(text, {"data": 1, "fsdp": 8})
    gathering = costs.collectives["all-gather", "fsdp"]
    assert gathering.count == 1 and gathering.overlapped == gathering.seconds > 0 == costs.exposed
    assert costs.seconds == pytest.approx(2 * 4096**3 / CHIPS["v5e"].flops)
    assert costs.bytes == 2 * (4096 * 1024 + 512 * 1024) + 2 * 2 * 4096 * 4096  # the gathering's, the product's


@pytest.mark.parametrize("root, kind, part", [("%d", "reduce-scatter", 1), ("%r", "all-reduce", 2)])
def test_an_all_reduce_fused_with_its_slices_is_a_reduce_scatter(root, kind, part):
    """Libtpu writes a reduce-scatter so; a fusion that returns the whole sum, too, is an all-reduce."""
    whole, shard = "f32[4096,128]{1,0}", "f32[512,128]{1,0}"
    lines = {
        "%d": f"  ROOT %d = {shard} dynamic-slice(%e, %i, %z), dynamic_slice_sizes={{512,128}}",
        "%r": f"  %d = {shard} dynamic-slice(%e, %i, %z), dynamic_slice_sizes={{512,128}}\n"
        f"  ROOT %t = ({shard}, {whole}) tuple(%d, %e)",
    }
    text = f"""HloModule m, is_scheduled=true

%summed (p: f32[4096,128]) -> f32[512,128] {{
  %p = {whole} parameter(0)
  %r = ({whole}) all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  %e = {whole} get-tuple-element(%r), index=0
  %i = u32[] partition-id()
  %z = u32[] constant(0)
{lines[root]}
}}

ENTRY %main (a: f32[4096,128]) -> f32[512,128] {{
  %a = {whole} parameter(0)
  ROOT %s = {shard} fusion(%a), kind=kCustom, calls=%summed
}}
"""
    [collective] = analyse(text, {"data": 1, "fsdp": 8}).collectives.values()
    assert (collective.kind, collective.axis) == (kind, "fsdp")
    assert collective.bytes == part * 7 / 8 * 4096 * 128 * 4


def test_what_a_collective_in_pieces_passes_through_fusions_is_neither_read_nor_written():
    """A collective over three fusions, as in a TPU's program: one starts it, one negates `b` meanwhile, one waits for
    it.
    """
    gather = "all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}"
    part, whole, other = "bf16[512,1024]{1,0}", "bf16[4096,1024]{1,0}", "bf16[64,64]{1,0}"
    text = f"""HloModule m, is_scheduled=true

%start (p: bf16[512,1024]) -> (bf16[512,1024], bf16[4096,1024]) {{
  %p = {part} parameter(0)
  %g = {whole} {gather}
  ROOT %r = ({part}, {whole}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%beside (p: bf16[512,1024], w: bf16[4096,1024], b: bf16[64,64]) -> (bf16[64,64], bf16[512,1024], bf16[4096,1024], bf16[4096,1024]) {{
  %p = {part} parameter(0)
  %w = {whole} parameter(1)
  %b = {other} parameter(2)
  %g = {whole} {gather}
  %n = {other} negate(%b)
  ROOT %r = ({other}, {part}, {whole}, {whole}) tuple(%n, %p, %w, %g)
}}

%done (p: bf16[512,1024], w: bf16[4096,1024]) -> bf16[4096,1024] {{
  %p = {part} parameter(0)
  %w = {whole} parameter(1)
  %g = {whole} {gather}
  ROOT %r = {whole} custom-call(%p, %w, %g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (a: bf16[512,1024], b: bf16[64,64]) -> bf16[4096,1024] {{
  %a = {part} parameter(0)
  %b = {other} parameter(1)
  %s = ({part}, {whole}) fusion(%a), kind=kCustom, calls=%start
  %sp = {part} get-tuple-element(%s), index=0
  %sw = {whole} get-tuple-element(%s), index=1
  %m = ({other}, {part}, {whole}, {whole}) fusion(%sp, %sw, %b), kind=kOutput, calls=%beside
  %mp = {part} get-tuple-element(%m), index=1
  %mw = {whole} get-tuple-element(%m), index=2
  ROOT %d = {whole} fusion(%mp, %mw), kind=kCustom, calls=%done
}}
"""
    costs = analyse(text, {"data": 1, "fsdp": 8})
    assert costs.collectives["all-gather", "fsdp"].count == 1
    assert (
        costs.bytes == 2 * (4096 * 1024 + 512 * 1024) + 2 * 2 * 64 * 64
    )  # the gathering's, and b read and its negative written


def test_bytes_of_a_cut_and_of_a_piece_written():
    text = """HloModule m, is_scheduled=true

%cut (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
}

%put (q: f32[100,8], v: f32[1,8], j: s32[]) -> f32[100,8] {
  %q = f32[100,8]{1,0} parameter(0)
  %v = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%q, %v, %j, %z.1)
}

ENTRY %main (a: f32[100,8], k: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %x = f32[1,8]{1,0} fusion(%a, %k), kind=kLoop, calls=%cut
  ROOT %y = f32[100,8]{1,0} fusion(%a, %x, %k), kind=kLoop, calls=%put
}
"""
    row, index = 8 * 4, 4
    assert analyse(text, {"data": 8}).bytes == (row + row + index) + (row + row + index)
