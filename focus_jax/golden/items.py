"""Recorded metric cases: the items of `items.json`, and aggregates that must come out the same."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from focus_jax.evaluate.files import read_rows
from focus_jax.golden.case import Recorded

ITEMS = "items.json"
# Aggregates are sums of a few hundred numbers: what differs by more is another rule.
RELATIVE = 1e-9
Item = dict[str, Any]


def read_items(case: Recorded, needed: Iterable[str]) -> Sequence[Item]:
    """A case's items. ValueError: the file is missing or no list, or an item lacks a field."""
    path = case.directory / ITEMS
    if not path.is_file():
        raise ValueError(f"there is no {path}, which holds the case's items")
    items = read_rows(path)
    if not items:
        raise ValueError(f"{path} holds no item")
    for number, item in enumerate(items):
        if lacking := [name for name in needed if name not in item]:
            raise ValueError(f"{path}: item {number} has no {', '.join(lacking)}")
    return items


def check_items(items: Iterable[Item], ours: Iterable[Mapping[str, Any]]) -> None:
    """Our values beside those recorded of each item. ValueError: the first that differs."""
    for number, (item, values) in enumerate(zip(items, ours, strict=True)):
        for name, value in values.items():
            if name in item and not same(value, item[name]):
                raise ValueError(f"item {number}: {name} is {value!r} instead of {item[name]!r}")


def check_aggregate(recorded: Mapping[str, Any], ours: Mapping[str, Any], at: str = "") -> None:
    """Every recorded figure beside ours. ValueError: the first that differs or is not computed."""
    for name, value in recorded.items():
        where = f"{at}.{name}" if at else f"aggregate.{name}"
        if name not in ours:
            raise ValueError(f"{where}: nothing here computes it")
        if isinstance(value, dict):
            check_aggregate(value, ours[name], where)
            if more := set(ours[name]) - set(value):
                raise ValueError(f"{where} lacks {', '.join(sorted(map(str, more)))}")
        elif not same(ours[name], value):
            raise ValueError(f"{where} is {ours[name]!r} instead of {value!r}")


def same(ours: Any, recorded: Any) -> bool:
    """Equal; numbers up to rounding; lists entry by entry."""
    if isinstance(recorded, list) and isinstance(ours, list | tuple):
        return len(ours) == len(recorded) and all(map(same, ours, recorded))
    numbers = (int, float)
    if isinstance(ours, numbers) and isinstance(recorded, numbers):
        return math.isclose(ours, recorded, rel_tol=RELATIVE, abs_tol=RELATIVE)
    return bool(ours == recorded)
