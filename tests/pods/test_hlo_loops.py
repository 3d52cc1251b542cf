"""How often loops run, against counting in Python."""

import pytest

from focus_jax.pods.hlo_loops import trips
from focus_jax.pods.hlo_text import parse

COUNTER = """HloModule m

%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %i2 = s32[]{{:T(128)S(6)}} copy(%i)
  %x = f32[8]{{0:T(128)}} get-tuple-element(%p), index=1
  %held = s32[]{{:T(128)}} get-tuple-element(%p), index=2
  %step = s32[] constant({step})
  %next = s32[]{{:T(128)}} {change}(%i2, {by})
  ROOT %t = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) tuple(%next, %x, %held)
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction={direction}
}}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {{
  %q = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  %n = s32[] constant({end})
  ROOT %goes = pred[] fusion(%j, %n), kind=kLoop, calls=%compared
}}

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0:T(128)}} parameter(0)
  %first = s32[] constant({first})
  %three = s32[] constant(3)
  %start = s32[] copy(%first)
  %t.1 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) tuple(%start, %x.1, %three)
  %loop = (s32[], f32[8]{{0}}, s32[]) while(%t.1), condition=%condition, body=%body
  ROOT %y = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


def count(text, start):
    module = parse(text)
    return trips(module, module["main"]["loop"], start)


@pytest.mark.parametrize(
    ("first", "end", "step", "change", "direction", "expected"),
    [
        (0, 6, 1, "add", "LT", len(range(0, 6))),
        (0, 7, 2, "add", "LT", len(range(0, 7, 2))),
        (0, 8, 2, "add", "LE", len(range(0, 9, 2))),
        (5, -1, 1, "subtract", "GT", len(range(5, -1, -1))),
        (10, 1, 3, "subtract", "GE", len(range(10, 0, -3))),
        (0, 8, 4, "add", "NE", 2),
        (1, 1000, 2, "multiply", "LT", 10),
        (9, 4, 1, "add", "LT", 0),
    ],
)
@pytest.mark.parametrize("by", ["%step", "%held"])
def test_first_value_step_and_comparison(first, end, step, change, direction, expected, by):
    """`%held`: the step is handed in from outside, as the compiler does with constants."""
    text = COUNTER.format(
        first=first, end=end, step=step, change=change, direction=direction, by=by
    )
    assert count(text, [first, None, step]) == (expected, False)


def test_a_loop_that_can_not_be_read():
    fields = dict(first=0, end=4, step=1, direction="LT", by="%step")
    text = COUNTER.format(**fields, change="add")
    assert count(text, [None, None, None]).runs is None
    assert count(text, None).runs is None
    # Never ends.
    assert count(COUNTER.format(**{**fields, "step": 0}, change="add"), [0, None, 1]).runs is None
    # Not an operation on integers that is known.
    assert count(COUNTER.format(**fields, change="power"), [0, None, 1]).runs is None


def test_the_compilers_own_count_comes_first():
    text = COUNTER.format(first=0, end=4, step=1, change="add", direction="LT", by="%step")
    known = 'body=%body, backend_config={"known_trip_count":{"n":"32"}}'
    assert count(text.replace("body=%body", known), None) == (32, False)


# A loop of a windowed einsum as a TPU states it: two steps in one run, a count without a sign.
WINDOWED = """HloModule m

%wide.windowed_dot_general_body_ag (p: (bf16[8], u32[], u32[16], s32[])) -> (bf16[8], u32[], u32[16], s32[]) {
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %p = (bf16[8]{0:T(256)}, u32[]{:T(128)}, u32[16]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %partition-id.21 = u32[]{:T(128)S(6)} partition-id()
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %table = u32[16]{0:T(128)} get-tuple-element(%p), index=2
  %dynamic-slice.183 = u32[1]{0:T(128)} dynamic-slice(%table, %partition-id.21), dynamic_slice_sizes={1}
  %bitcast.181 = u32[]{:T(128)} bitcast(%dynamic-slice.183)
  %add.224 = u32[]{:T(128)S(6)} add(%i, %bitcast.181)
  %x = bf16[8]{0:T(256)} get-tuple-element(%p), index=0
  %add.226 = u32[]{:T(128)S(6)} add(%i, %one)
  %add.228 = u32[]{:T(128)} add(%i, %two)
  %width = s32[]{:T(128)} get-tuple-element(%p), index=3
  ROOT %tuple.145 = (bf16[8]{0:T(256)}, u32[]{:T(128)}, u32[16]{0:T(128)}, s32[]{:T(128)}) tuple(%x, %add.228, %table, %width)
}

%wide.windowed_dot_general_cond_ag (q: (bf16[8], u32[], u32[16], s32[])) -> pred[] {
  %constant.546 = u32[]{:T(128)} constant(4)
  %q = (bf16[8]{0:T(256)}, u32[]{:T(128)}, u32[16]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %compare.18 = pred[]{:T(512)} compare(%j, %constant.546), direction=LT
}

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %a = bf16[8]{0:T(256)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %t = (bf16[8]{0:T(256)}, u32[]{:T(128)}, u32[16]{0:T(128)}, s32[]{:T(128)}) tuple(%a, %zero, %zero, %zero)
  %loop = (bf16[8]{0:T(256)}, u32[]{:T(128)}, u32[16]{0:T(128)}, s32[]{:T(128)}) while(%t), condition=%wide.windowed_dot_general_cond_ag, body=%wide.windowed_dot_general_body_ag
  ROOT %b = bf16[8]{0:T(256)} get-tuple-element(%loop), index=0
}
"""  # noqa: E501


def test_a_windowed_product_of_two_steps():
    assert count(WINDOWED, [None, 0, None, 512]) == (2, False)


# Ends after seven runs, or when all values pass a bound.
EARLY = COUNTER.replace(
    "ROOT %goes = pred[] fusion(%j, %n), kind=kLoop, calls=%compared",
    """%before = pred[] fusion(%j, %n), kind=kLoop, calls=%compared
  %z = f32[8]{{0}} get-tuple-element(%q), index=1
  %done = pred[] custom-call(%z), custom_call_target="AllPassed"
  %not = pred[] not(%done)
  ROOT %goes = pred[] {joined}(%before, %not)""",
)


def test_an_early_end_is_told():
    fields = dict(first=0, end=7, step=1, change="add", direction="LT", by="%step")
    assert count(EARLY.format(**fields, joined="and"), [0, None, None]) == (7, True)
    assert count(EARLY.format(**fields, joined="or"), [0, None, None]).runs is None
