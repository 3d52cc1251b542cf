"""What a program does on one device, against counts by hand: compiled here, and recorded texts."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from focus_jax.pods.hlo import Collective, read_program
from tests.quick import compiled

ROOT = Path(__file__).parents[2]
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
EIGHT = {"data": 1, "fsdp": 4, "tensor": 2}
TPU = "HloModule jit_step, is_scheduled=true, num_partitions=8\n"


def scanned(body, x, length):
    return jax.lax.scan(lambda c, _: (body(c), None), x, None, length=length)[0]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x: scanned(lambda c: jnp.tanh(c @ c), x, 5), 5),
        (lambda x: scanned(lambda c: scanned(lambda d: d @ d + c, c, 3), x, 4), 12),
        (
            lambda x: scanned(lambda c: scanned(lambda d: d @ d, c @ c, 3) @ c, x, 4),
            4 * (1 + 3 + 1),
        ),
        (lambda x: jax.lax.fori_loop(2, 9, lambda i, c: c @ c, x), 7),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), 2),
    ],
)
def test_loops_count_as_often_as_they_run(function, products):
    text = compiled(function).lower(jnp.ones((8, 8))).compile().as_text()
    program = read_program(text, ONE)
    assert program.flops == products * 2 * 8**3
    assert program.unknown_loops == () and program.collectives == ()
    # Each product reads a matrix at least once and writes one.
    assert program.hbm_bytes >= products * 2 * 8 * 8 * 4


def test_loops_that_can_not_be_read_are_named():
    def times(x, n):
        return jax.lax.fori_loop(0, n, lambda i, c: c @ c, x)

    program = read_program(compiled(times).lower(jnp.ones((8, 8)), 4).compile().as_text(), ONE)
    (loop,) = program.unknown_loops
    assert "jit(times)/while" in loop
    assert program.flops == 2 * 8**3


def test_what_data_decide_is_told():
    def stop(x):
        go_on = lambda s: (s[0] < 7) & ~jnp.all(s[1] > 3)  # noqa: E731
        return jax.lax.while_loop(go_on, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]

    def branch(x, which):
        return jax.lax.switch(which, [lambda x: x @ x, lambda x: x @ x @ x, lambda x: x], x)

    x = jnp.ones((8, 8))
    program = read_program(compiled(stop).lower(x).compile().as_text(), ONE)
    assert program.flops == 7 * 2 * 8**3
    assert "runs all of its 7 times" in program.assumed[0]
    program = read_program(compiled(branch).lower(x, 1).compile().as_text(), ONE)
    assert program.flops == 2 * 2 * 8**3
    assert "always takes the largest of its 3 branches" in program.assumed[0]


PROGRAMS = """
    import json, sys
    from functools import partial
    import jax, jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from focus_jax.pods.hlo import read_program

    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    local = partial(jax.shard_map, mesh=mesh, check_vma=False)

    @local(in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    def by_hand(x, w):
        def body(c, _):
            h = jax.lax.all_gather(c, "fsdp", tiled=True) @ w
            h = jax.lax.psum(h, ("data", "tensor"))
            s = jax.lax.psum_scatter(h, "fsdp", tiled=True)
            s = jax.lax.ppermute(s, "tensor", [(0, 1), (1, 0)])
            return jnp.sin(jax.lax.all_to_all(s, "data", 0, 0, tiled=True)), None
        return jax.lax.scan(body, x, None, length=5)[0]

    pin = jax.lax.with_sharding_constraint
    at = lambda *axes: NamedSharding(mesh, P(*axes))

    def gathered(w, x):
        def loss(w):
            @jax.checkpoint
            def body(x, w):
                return jnp.tanh(pin(x @ pin(w, at(None, None)), at(("data", "fsdp")))), None
            return jax.lax.scan(body, x, w)[0].mean()
        return jax.grad(loss)(w)

    def shape(*dims, spec=()):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=at(*spec))

    found = {}
    for name, function, arguments, out in [
        ("by_hand", by_hand, (shape(16, 8, spec=("fsdp",)), shape(8, 8)), None),
        ("gathered", gathered,
         (shape(3, 32, 32, spec=(None, "fsdp")), shape(64, 32, spec=(("data", "fsdp"),))),
         at(None, "fsdp")),
        ("alone", lambda x: x @ x, (shape(8, 8),), None),
    ]:
        text = jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text()
        program = read_program(text, mesh.shape)
        found[name] = {
            "flops": program.flops, "unknown": program.unknown_loops,
            "collectives": [[*c, c.total, c.wire] for c in program.collectives],
        }
    json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def sharded():
    """What the reader says of programs on eight simulated devices."""
    flags = [os.environ["XLA_FLAGS"], "--xla_force_host_platform_device_count=8"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAMS)],
        env={**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_collectives_by_hand_in_a_loop(sharded):
    found = sharded["by_hand"]
    assert found["flops"] == 5 * 2 * 16 * 8 * 8 and found["unknown"] == []
    rows, whole = 8 * 8 * 4, 16 * 8 * 4
    by_kind = {each[0]: each[2:6] + each[7:] for each in found["collectives"]}
    assert len(found["collectives"]) == 5
    assert by_kind == {
        "all-gather": [whole, 2, ["fsdp"], 5, 5 * whole, 5 * whole / 2],
        "all-reduce": [whole, 4, ["data", "tensor"], 5, 5 * whole, 5 * 2 * whole * 3 / 4],
        "reduce-scatter": [whole, 2, ["fsdp"], 5, 5 * whole, 5 * whole / 2],
        "collective-permute": [rows, 2, ["tensor"], 5, 5 * rows, 5 * rows],
        "all-to-all": [rows, 2, ["data"], 5, 5 * rows, 5 * rows / 2],
    }


@pytest.mark.slow
def test_weights_gathered_in_a_scanned_layer(sharded):
    found = sharded["gathered"]
    # 16 rows a device; forward, again for the backward pass, gradients of rows and of weights.
    assert found["flops"] == 3 * 4 * 2 * 16 * 32 * 32 and found["unknown"] == []
    gathers = [each for each in found["collectives"] if each[0] == "all-gather"]
    assert [each[2:6] for each in gathers] == [[32 * 32 * 4, 2, ["fsdp"], 3]] * 2
    # Gradients of the weights: summed over the batch, once for each layer.
    sums = [each for each in found["collectives"] if each[0] in ("all-reduce", "reduce-scatter")]
    assert {axis for each in sums if each[2] > 8 for axis in each[4]} == {"data", "fsdp"}
    assert sharded["alone"] == {"flops": 2 * 8**3, "unknown": [], "collectives": []}


# A TPU's asynchronous all-gather: started, carried on beside a product, and done, in three fusions.
ASYNC = """
%bitcast_fusion (bitcast_input.22: bf16[2,512,1024]) -> bf16[2,512,1024] {
  %bitcast_input.22 = bf16[2,512,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %bitcast.90 = bf16[2,512,1024]{2,1,0:T(8,128)(2,1)} bitcast(%bitcast_input.22)
}

%fused_computation.40 (param_0.115: bf16[2048,256]) -> (bf16[2048,256], bf16[2048,1024], s32[2], u32[]) {
  %param_0.115 = bf16[2048,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.21 = bf16[2048,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.115), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/while/body/gather" stack_frame_id=16}
  ROOT %custom-call.2 = (bf16[2048,256]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.21), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.78 (param_0.119: bf16[2048,256], param_1.106: bf16[2048,1024], param_2.52: s32[2], param_3.18: u32[], param_9.2: bf16[1024,2048,1], param_10.3: bf16[2,512,1024]) -> (bf16[2,512,2048], bf16[2048,256], bf16[2048,1024], bf16[2048,1024], s32[2], /*index=5*/u32[]) {
  %param_10.3 = bf16[2,512,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(5)
  %fusion.82 = bf16[2,512,1024]{2,1,0:T(8,128)(2,1)} fusion(%param_10.3), kind=kLoop, calls=%bitcast_fusion
  %param_9.2 = bf16[1024,2048,1]{1,0,2:T(8,128)(2,1)S(1)} parameter(4)
  %convolution.31 = bf16[2,512,2048]{2,1,0:T(8,128)(2,1)S(1)} convolution(%fusion.82, %param_9.2), window={size=1}, dim_labels=0bf_io0->0bf, metadata={op_name="jit(step)/while/body/dot_general" stack_frame_id=20}
  %param_0.119 = bf16[2048,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.106 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.23 = bf16[2048,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.119), channel_id=2, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %param_2.52 = s32[2]{0:S(4)} parameter(2)
  %param_3.18 = u32[]{:S(2)} parameter(3)
  ROOT %tuple.63 = (bf16[2,512,2048]{2,1,0:T(8,128)(2,1)S(1)}, bf16[2048,256]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) tuple(%convolution.31, %param_0.119, %param_1.106, %all-gather.23, %param_2.52, /*index=5*/%param_3.18)
}

%fused_computation.42 (param_0.121: bf16[2048,256], param_1.107: bf16[2048,1024], param_2.54: s32[2], param_3.20: u32[]) -> bf16[2048,1024] {
  %param_0.121 = bf16[2048,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.107 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.25 = bf16[2048,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.121), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %param_2.54 = s32[2]{0:S(4)} parameter(2)
  %param_3.20 = u32[]{:S(2)} parameter(3)
  ROOT %custom-call.4 = bf16[2048,1024]{1,0:T(8,128)(2,1)} custom-call(%param_0.121, %param_1.107, %all-gather.25, %param_2.54, %param_3.20), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[2048,256], v: bf16[1024,2048,1], x: bf16[2,512,1024]) -> bf16[2048,1024] {
  %w = bf16[2048,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %v = bf16[1024,2048,1]{1,0,2:T(8,128)(2,1)S(1)} parameter(1)
  %x = bf16[2,512,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %async-collective-start = (bf16[2048,256]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.40
  %g0 = bf16[2048,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=0
  %g1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %g2 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %g3 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=3
  %fusion.78 = (bf16[2,512,2048]{2,1,0:T(8,128)(2,1)S(1)}, bf16[2048,256]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) fusion(%g0, %g1, %g2, %g3, %v, /*index=5*/%x), kind=kOutput, calls=%async_collective_fusion.78
  %h0 = bf16[2048,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.78), index=1
  %h1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.78), index=2
  %h2 = s32[2]{0:S(4)} get-tuple-element(%fusion.78), index=4
  %h3 = u32[]{:S(2)} get-tuple-element(%fusion.78), index=5
  ROOT %async-collective-done = bf16[2048,1024]{1,0:T(8,128)(2,1)} fusion(%h0, %h1, %h2, %h3), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%fused_computation.42
}
"""  # noqa: E501


def test_an_asynchronous_collective_counts_once():
    program = read_program(TPU + ASYNC, EIGHT)
    whole = 2048 * 1024 * 2
    assert program.collectives == (
        Collective(
            "all-gather", ("bf16[2048,1024]",), whole, 4, ("fsdp",), 1,
            "jit(step)/while/body/gather",
        ),
    )  # fmt: skip
    assert program.flops == 2 * 1024 * 1024 * 2048
    # All but the gathered array lies in fast memory, and that is written once.
    assert program.hbm_bytes == whole
    assert program.kernels == ()


# A reduce-scatter as a TPU states it, and an all-reduce that stays one.
SCATTER = """
%add.2 (x.7: bf16[], y.5: bf16[]) -> bf16[] {
  %y.5 = bf16[]{:T(256)} parameter(1)
  %x.7 = bf16[]{:T(256)} parameter(0)
  ROOT %add.42 = bf16[]{:T(256)} add(%x.7, %y.5)
}

%all-reduce-scatter.clone.1 (input.5: bf16[1024,2048]) -> bf16[256,2048] {
  %input.5 = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.13 = bf16[1024,2048]{1,0:T(8,128)(2,1)} all-reduce(%input.5), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, to_apply=%add.2, frontend_attributes={from-cross-replica-sharding="true"}, backend_config={"flag_configs":[],"barrier_config":{"barrier_type":"CUSTOM","id":"3"}}
  %constant.shard_id_table.5 = u32[8]{0:T(128)} constant({0, 0, 1, 1, 2, 2, 3, 3})
  %partition-id.10 = u32[] partition-id()
  %dynamic-slice.63 = u32[1]{0:T(128)} dynamic-slice(%constant.shard_id_table.5, %partition-id.10), dynamic_slice_sizes={1}
  %bitcast.82 = u32[]{:T(128)} bitcast(%dynamic-slice.63)
  %constant.200 = u32[] constant(256)
  %multiply.8 = u32[]{:T(128)} multiply(%bitcast.82, %constant.200)
  %constant.201 = u32[] constant(0)
  ROOT %dynamic-slice.64 = bf16[256,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.13, %multiply.8, %constant.201), dynamic_slice_sizes={256,2048}
}

ENTRY %main (g: bf16[1024,2048], s: f32[4]) -> (bf16[256,2048], f32[4], bf16[8]) {
  %g = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %s = f32[4]{0:T(128)} parameter(1)
  %h = bf16[8]{0:T(256)} parameter(2)
  %fusion.75 = bf16[256,2048]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone.1, metadata={op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=20}, backend_config={"flag_configs":[]}
  %all-reduce.4 = (f32[4]{0:T(128)}, bf16[8]{0:T(256)}) all-reduce(%s, %h), channel_id=9, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=1,'axis_3'=2] {'axis_0','axis_3'}, use_global_device_ids=true, to_apply=%add.2, metadata={op_name="jit(step)/norm"}
  %a = f32[4]{0:T(128)} get-tuple-element(%all-reduce.4), index=0
  %b = bf16[8]{0:T(256)} get-tuple-element(%all-reduce.4), index=1
  ROOT %t = (bf16[256,2048]{1,0:T(8,128)(2,1)}, f32[4]{0:T(128)}, bf16[8]{0:T(256)}) tuple(%fusion.75, %a, %b)
}
"""  # noqa: E501


def test_a_hidden_reduce_scatter_and_a_combined_all_reduce():
    scatter, reduce = read_program(TPU + SCATTER, EIGHT).collectives
    whole = 1024 * 2048 * 2
    assert scatter[:6] == ("reduce-scatter", ("bf16[1024,2048]",), whole, 4, ("fsdp",), 1)
    assert scatter.name == "jit(step)/transpose(jvp())/dot_general"
    assert scatter.wire == whole * 3 / 4
    assert reduce[:6] == ("all-reduce", ("f32[4]", "bf16[8]"), 32, 8, ("fsdp", "tensor"), 1)
    assert reduce.wire == 2 * 32 * 7 / 8


# Pairs of start and done, of which some wrap a computation.
STARTS = """
%add.2 (x.7: f32[], y.5: f32[]) -> f32[] {
  %y.5 = f32[] parameter(1)
  %x.7 = f32[] parameter(0)
  ROOT %add.42 = f32[] add(%x.7, %y.5)
}

%wrapped (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%p), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add.2
}

ENTRY %main (a: f32[16], b: f32[64]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %ag = (f32[16]{0}, f32[64]{0}) all-gather-start(%a), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %agd = f32[64]{0} all-gather-done(%ag)
  %ags = ((f32[16]{0}, f32[16]{0}), (f32[64]{0}, f32[64]{0})) all-gather-start(%a, %a), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}
  %agsd = (f32[64]{0}, f32[64]{0}) all-gather-done(%ags)
  %ar = f32[64]{0} all-reduce-start(%b), channel_id=3, replica_groups={}, to_apply=%add.2
  %ard = f32[64]{0} all-reduce-done(%ar)
  %cp = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%b), channel_id=4, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %cpd = f32[64]{0} collective-permute-done(%cp)
  %as = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%b), calls=%wrapped
  %au = ((f32[64]{0}), f32[16]{0}, u32[]) async-update(%as), calls=%wrapped
  %rs.1 = f32[16]{0} async-done(%au), calls=%wrapped
  %aa = ((f32[64]{0}), f32[64]{0}, u32[]) all-to-all-start(%b), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %aad = f32[64]{0} all-to-all-done(%aa)
  ROOT %r = f32[16]{0} copy(%rs.1)
}
"""  # noqa: E501


def test_starts_count_and_dones_do_not():
    found = read_program(TPU + STARTS, EIGHT).collectives
    assert [each[:5] for each in found] == [
        ("all-gather", ("f32[64]",), 256, 4, ("fsdp",)),
        ("all-gather", ("f32[64]", "f32[64]"), 512, 2, ("tensor",)),
        ("all-reduce", ("f32[64]",), 256, 8, ("fsdp", "tensor")),
        ("collective-permute", ("f32[64]",), 256, 2, ("tensor",)),
        ("reduce-scatter", ("f32[64]",), 256, 4, ("fsdp",)),
        ("all-to-all", ("f32[64]",), 256, 4, ("fsdp",)),
    ]


KERNEL = """HloModule m

%body (p: (s32[], f32[256,256])) -> (s32[], f32[256,256]) {
  %p = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[256,256]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %my_kernel.3 = f32[256,256]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[256,256]{1,0}}, frontend_attributes={kernel_metadata={}}, metadata={op_name="jit(kern)/while/body/my_kernel/pallas_call" stack_frame_id=7}, backend_config={"custom_call_config":{"body":"TUzvUgFN(TElSMjMuMC4wZ2l0"}}
  ROOT %t = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)}) tuple(%next, %my_kernel.3)
}

%condition (q: (s32[], f32[256,256])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %n = s32[]{:T(128)} constant(3)
  ROOT %c = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (x.1: f32[256,256]) -> f32[256,256] {
  %x.1 = f32[256,256]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t.1 = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)}) tuple(%zero, %x.1)
  %while = (s32[]{:T(128)}, f32[256,256]{1,0:T(8,128)}) while(%t.1), condition=%condition, body=%body
  ROOT %y = f32[256,256]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_kernels_by_target_with_shapes_and_times():
    program = read_program(KERNEL, {"data": 1})
    (kernel,) = program.kernels
    assert kernel.target == "tpu_custom_call" and kernel.times == 3
    assert kernel.operands == kernel.results == ("f32[256,256]",)
    assert kernel.name == "jit(kern)/while/body/my_kernel/pallas_call"
    assert program.flops == 0
    # In each run: the kernel's array read and written; the counter's sum and comparison.
    assert program.hbm_bytes == 3 * (2 * 256 * 256 * 4 + 12 + 9)


@pytest.mark.parametrize(
    ("text", "mesh", "said"),
    [
        (KERNEL, EIGHT, "for 1 devices and the mesh .* has 8: give the mesh it was compiled for"),
        ("module @jit_f {}", ONE, "not the text of an HLO module: it starts with 'module"),
        (KERNEL.replace("ENTRY ", ""), ONE, "no ENTRY computation"),
        (KERNEL.replace("body=%body", "body=%gone"), ONE, "calls %gone and never defines it"),
        (KERNEL.replace("add(%i, %one)", "add(%i, %two)"), ONE, "names %two in %body"),
        (KERNEL.replace("ROOT %t =", "%t ="), ONE, "marks 0 roots in %body"),
        (KERNEL.replace("  %n = s32", "  n: s32"), ONE, "a line of the HLO text can't be read"),
        (KERNEL.replace("%x.1 = f32[256,256]", "%x.1 = q9[256,256]"), ONE, "type 'q9' of unknown"),
    ],
)
def test_bad_texts_are_refused(text, mesh, said):
    with pytest.raises(ValueError, match=said):
        read_program(text, mesh)
