"""Mesh axes of collectives, against groups made coordinate by coordinate."""

import re
from itertools import combinations, product
from math import prod

import pytest

from focus_jax.pods.hlo_groups import along, read_groups
from focus_jax.pods.hlo_text import parse_line

MESHES = [
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 3, "tensor": 4},
    {"data": 2, "fsdp": 3, "tensor": 1},
]


def by_hand(mesh, axes):
    """Groups of devices whose other coordinates agree, the last axis counting fastest."""
    groups = {}
    for number, place in enumerate(product(*map(range, mesh.values()))):
        key = tuple(at for axis, at in zip(mesh, place, strict=True) if axis not in axes)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def as_list(mesh, axes):
    return str(by_hand(mesh, axes)).replace("[", "{").replace("]", "}").replace(" ", "")


def as_iota(mesh, axes):
    order = [*(a for a in mesh if a not in axes), *axes]
    width = prod(mesh[a] for a in axes)
    dims = ",".join(map(str, mesh.values()))
    turn = ",".join(str(list(mesh).index(a)) for a in order)
    return f"[{prod(mesh.values()) // width},{width}]<=[{dims}]T({turn})"


def as_mesh(mesh, axes):
    names = {axis: f"'axis_{at}'" for at, axis in enumerate(mesh)}
    sizes = ",".join(f"{names[axis]}={size}" for axis, size in mesh.items())
    return f"mesh[{sizes}] {{{','.join(names[axis] for axis in axes)}}}"


def op(groups, mesh):
    line = parse_line(f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {groups}, to_apply=%add")
    return along(line, mesh)


@pytest.mark.parametrize("write", [as_list, as_iota, as_mesh])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_groups_along_every_set_of_axes(mesh, write):
    wide = [axis for axis, size in mesh.items() if size > 1]
    for number in range(1, len(wide) + 1):
        for axes in combinations(wide, number):
            text = write(mesh, axes)
            assert sorted(map(sorted, read_groups(text, prod(mesh.values())))) == by_hand(
                mesh, axes
            )
            size = prod(mesh[axis] for axis in axes)
            assert op(f"replica_groups={text}, use_global_device_ids=true", mesh) == (size, axes)


@pytest.mark.parametrize(
    ("text", "size", "axes"),
    [
        ("{}", 8, ("fsdp", "tensor")),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", 1, ()),
        ("[8,1]<=[8]", 1, ()),
        ("[1,8]<=[8]", 8, ("fsdp", "tensor")),
        ("[4,2]<=[8]", 2, ("tensor",)),
        # Four neighbours: neither of the two axes, nor both.
        ("{{0,1,2,3},{4,5,6,7}}", 4, ("?",)),
        ("{{0,2,4},{1,3,5},{6,7}}", 3, ("?",)),
        # Half of the axis of four: `:(1)2` its slow half, `:(2)2` its fast one.
        ("mesh['a'=4,'b'=2] {'a':(1)2}", 2, ("?",)),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'a':(2)2}", 4, ("fsdp",)),
        ("mesh['x'=8] {'x':(1)4}", 4, ("fsdp",)),
        ("mesh['x'=8] {'x':(4)2}", 2, ("tensor",)),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", 4, ("fsdp",)),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", 2, ("tensor",)),
        ("mesh['x'=4,'y'=1,'z'=2] {'y'}", 1, ()),
    ],
)
def test_forms_on_one_mesh(text, size, axes):
    assert op(f"replica_groups={text}", {"data": 1, "fsdp": 4, "tensor": 2}) == (size, axes)


def test_parts_of_an_axis():
    assert read_groups("mesh['a'=4,'b'=2] {'a':(1)2}", 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert read_groups("mesh['a'=8] {'a':(2)2}", 8) == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize(
    ("pairs", "size", "axes"),
    [
        ("{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", 4, ("fsdp",)),
        ("{{0,2},{2,4},{4,6},{1,3},{3,5},{5,7}}", 4, ("fsdp",)),
        ("{{0,1},{1,0}}", 2, ("tensor",)),
        ("{{0,3},{3,0}}", 8, ("fsdp", "tensor")),
        ("{{0,9}}", 2, ("?",)),
    ],
)
def test_pairs_of_a_permutation(pairs, size, axes):
    line = f"  %x = f32[8]{{0}} collective-permute(%y), channel_id=1, source_target_pairs={pairs}"
    assert along(parse_line(line), {"data": 1, "fsdp": 4, "tensor": 2}) == (size, axes)


@pytest.mark.parametrize("text", ["mesh(a=2)", "<=[8]", "[2,4]", "mesh['a'=2] 'a'"])
def test_an_unknown_form_is_refused(text):
    with pytest.raises(ValueError, match=f"unknown form: .{re.escape(text)}"):
        read_groups(text, 8)
