"""Bytes of main memory that single instructions move, counted by hand."""

import pytest

from focus_jax.pods.hlo_text import bits, parse, parse_shape
from focus_jax.pods.hlo_traffic import Traffic

KB = 1024


def moved(lines, name, inside="", tiled=True):
    """Bytes of one instruction of a small program."""
    layout = "{:T(128)}" if tiled else "{}"
    text = f"""HloModule m
{inside}
ENTRY %main (i: s32[]) -> s32[] {{
  %i = s32[]{layout} parameter(0)
{lines}
  ROOT %end = s32[]{layout} copy(%i)
}}
"""
    module = parse(text)
    main = module["main"]
    return Traffic(module).bytes(main, main[name])


ARRAYS = """  %a = f32[256,1]{1,0:T(8,128)} parameter(1)
  %b = bf16[1024]{0:T(1024)} parameter(2)
  %fast = f32[256,1]{1,0:T(8,128)S(1)} parameter(3)
  %stack = f32[6,256]{1,0:T(8,128)} parameter(4)
  %rows = s32[2]{0:T(128)} parameter(5)
"""


@pytest.mark.parametrize(
    ("line", "kilobytes"),
    [
        ("f32[256]{0:T(256)} add(%a, %a)", 3),
        ("f32[256]{0:T(256)S(1)} add(%a, %fast)", 1),
        ("f32[256]{0:T(256)S(1)} multiply(%fast, %fast)", 0),
        ("f32[256]{0:T(256)} bitcast(%a)", 0),
        ("(f32[256]{0:T(256)}, bf16[1024]{0:T(1024)}) tuple(%a, %b)", 0),
        ("f32[1,256]{1,0:T(8,128)} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,256}", 2),
        ("f32[2,256]{1,0:T(8,128)} gather(%stack, %rows), slice_sizes={1,256}", 4),
        ("f32[6,256]{1,0:T(8,128)} dynamic-update-slice(%stack, %a, %i, %i)", 2),
        ("f32[6,256]{1,0:T(8,128)} dynamic-update-slice(%stack, %fast, %i, %i)", 1),
        ("f32[6,256]{1,0:T(8,128)} scatter(%stack, %rows, %a), to_apply=%add", 2),
        # Into fast memory and out of it again.
        ("(f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%a)", 1),
        ("(f32[256]{0:T(256)}, f32[256]{0:T(256)S(1)}, u32[]{:S(2)}) copy-start(%fast)", 1),
        ("f32[256]{0:T(256)S(1)} copy-done(%a)", 0),
        (
            "((f32[6,256]{1,0:T(8,128)}), f32[2,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
            "slice-start(%stack), slice={[0:2], [0:256]}",
            2,
        ),
        (
            "(f32[256]{0:T(256)}, f32[1024]{0:T(256)}) all-gather-start(%a), dimensions={0}",
            5,
        ),
        ("f32[256]{0:T(256)} all-reduce-start(%a), to_apply=%add", 2),
        ("f32[256]{0:T(256)} all-reduce-done(%a)", 0),
        ('f32[256]{0:T(256)} custom-call(%a, %b), custom_call_target="tpu_custom_call"', 4),
        ('f32[6,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_instructions(line, kilobytes):
    assert moved(f"{ARRAYS}  %x = {line}", "x") == kilobytes * KB


SLICED = """
%inside (p: f32[6,256], i: s32[], q: f32[1,256]) -> (f32[6,256], f32[1,256]) {
  %p = f32[6,256]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %q = f32[1,256]{1,0:T(8,128)} parameter(2)
  %view = f32[6,256]{1,0:T(8,128)} bitcast(%p)
  %slice = f32[1,256]{1,0:T(8,128)} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={1,256}
  %sum = f32[1,256]{1,0:T(8,128)} add(%slice, %q)
  %update = f32[6,256]{1,0:T(8,128)} dynamic-update-slice(%p, %sum, %i, %zero)
  ROOT %t = (f32[6,256]{1,0:T(8,128)}, f32[1,256]{1,0:T(8,128)}) tuple(%update, %sum)
}
"""


@pytest.mark.parametrize(
    ("layer", "fast", "kilobytes"),
    # A slice read, a row read, an update and a row written; of them those in fast memory are free.
    [("", "", 4), ("S(1)", "", 2), ("", "S(1)", 2), ("S(1)", "S(1)", 0)],
)
def test_a_fusion_that_slices_and_updates_in_place(layer, fast, kilobytes):
    stack, row = f"f32[6,256]{{1,0:T(8,128){layer}}}", f"f32[1,256]{{1,0:T(8,128){fast}}}"
    lines = f"""  %s = {stack} parameter(1)
  %r = {row} parameter(2)
  %where = s32[]{{:T(128)S(6)}} copy(%i)
  %x = ({stack}, {row}) fusion(%s, %where, %r), kind=kLoop, calls=%inside"""
    assert moved(lines, "x", SLICED) == kilobytes * KB


def test_a_fusion_that_reads_all_reads_it_once():
    inside = """
%inner (w: f32[6,256]) -> f32[1,256] {
  %w = f32[6,256]{1,0} parameter(0)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,256]{1,0} dynamic-slice(%w, %zero, %zero), dynamic_slice_sizes={1,256}
}

%inside (p: f32[6,256]) -> f32[6,256] {
  %p = f32[6,256]{1,0} parameter(0)
  %row = f32[1,256]{1,0} fusion(%p), kind=kLoop, calls=%inner
  %all = f32[6,256]{1,0} negate(%p)
  %wide = f32[6,256]{1,0} broadcast(%row), dimensions={0,1}
  ROOT %sum = f32[6,256]{1,0} add(%all, %wide)
}
"""
    lines = """  %s = f32[6,256]{1,0} parameter(1)
  %x = f32[6,256]{1,0} fusion(%s), kind=kLoop, calls=%inside"""
    assert moved(lines, "x", inside, tiled=False) == 12 * KB
    # On a GPU space 1 is main memory too.
    spaced = lines.replace("%s = f32[6,256]{1,0}", "%s = f32[6,256]{1,0:S(1)}")
    assert moved(spaced, "x", inside, tiled=False) == 12 * KB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("pred[5]{0}", 5),
        ("s4[5]{0:E(4)}", 3),
        ("f8e4m3fn[7]{0}", 7),
        ("s8[4,2]", 8),
        ("u8[3]{0}", 3),
        ("f64[]", 8),
        ("c64[2]{0}", 16),
        ("token[]", 0),
        ("(f32[2]{0}, (u32[], bf16[3]{0:T(256)}), /*index=2*/s64[<=4]{0})".replace(
            "/*index=2*/", ""), 8 + 4 + 6 + 32),
        ("f32[0,8]{1,0}", 0),
    ],
)  # fmt: skip
def test_bytes_of_shapes(text, size):
    assert sum(array.bytes for array in parse_shape(text).arrays) == size


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="type 'x7' of unknown size"):
        bits("x7")
