"""Plans of pods as words: one table a plan, one line a plan, and a page made from JSON files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_jax.pods.chips import GIB
from focus_jax.workdir import write_text

MARK = "<!-- Written by `python -m focus_jax plan --markdown`; what follows is replaced. -->"
Value = Mapping[str, Any]


def table(plan: Value) -> str:
    """One plan (`PodPlan.to_json`) as a Markdown table."""
    rows = [*verdict(plan), *work(plan), *network(plan), *speed(plan)]
    rows += [("note", note) for note in plan["notes"]]
    head = f"| {plan['method']}, {plan['what']} {plan['stage']} | {plan['topology']} |"
    lines = [head, "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def verdict(plan: Value) -> list[tuple[str, str]]:
    """Whether it fits, and what stands where."""
    memory = plan["memory"]
    parts = ", ".join(
        f"{name} {gib(memory[name])}" for name in ("argument", "output", "aliased", "temporary")
    )
    used = memory["total"] / memory["hbm"]
    out = [
        ("mesh", f"{mesh_words(plan)}: {plan['devices']} devices"),
        ("batch", f"{batch_words(plan)} images of {plan['tiles']} tiles, text {plan['text']}"),
        ("remat", plan["remat"]),
        ("fits", f"{'yes' if plan['fits'] else 'NO'}, {used:.0%} of {gib(memory['hbm'])}"),
        ("memory of a device", parts),
    ]
    return out + ([("refused", plan["refused"])] if plan["refused"] else [])


def work(plan: Value) -> list[tuple[str, str]]:
    """Operations and memory traffic."""
    flops = plan["flops"]
    name = "FLOPs of a device" if plan["compiled"] else "FLOPs of a device (estimate)"
    parts = f"{tera(flops['products'])} products + {tera(flops['attention'])} attention kernels"
    return [
        (name, f"{tera(flops['compiled'])} = {parts}"),
        ("model FLOPs of a device", f"{tera(flops['model'])}, {flops['ratio']:.3f} of that"),
        ("which are", flops["convention"]),
        ("bytes from and to HBM", giga(plan["hbm_bytes"])),
    ]


def network(plan: Value) -> list[tuple[str, str]]:
    """Collectives, most bytes first."""
    total = f"{giga(plan['payload'])} payload, {giga(plan['wire'])} on the wire"
    rows = [("collectives of a device", total)]
    for one in plan["collectives"]:
        axes = ", ".join(one["axes"]) or "none"
        rows.append(
            (
                f"{one['kind']} along {axes}",
                f"{giga(one['payload'])} payload, {giga(one['wire'])} wire, {one['runs']} runs, "
                f"{ms(one['all_links'])} on all links, {ms(one['own_links'])} on its own",
            )
        )
    return rows


def speed(plan: Value) -> list[tuple[str, str]]:
    """Least times and what follows from them."""
    seconds = plan["seconds"]
    return [
        ("compute", ms(seconds["compute"])),
        ("memory", ms(seconds["memory"])),
        ("network, all links", ms(seconds["network_all_links"])),
        ("network, own links", ms(seconds["network_own_links"])),
        ("bound by", plan["bound"]),
        ("ceiling on MFU", f"{plan['mfu_ceiling']:.1%}"),
        (
            "at most",
            f"{plan['images_per_second']:,.1f} images/s, {plan['tokens_per_second']:,.0f} tokens/s",
        ),
    ]


# --------------------------------------------------------------------------------- lines

COLUMNS = (
    "plan", "batch, remat", "GiB argument + temporary", "of HBM", "fits", "model / compiled TF",
    "ratio", "GB payload", "GB wire", "compute ms", "memory ms", "network ms all / own", "bound",
    "MFU at most", "images/s",
)  # fmt: skip


def lines(plans: Sequence[Value]) -> str:
    """Plans as rows of one Markdown table."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *(line(plan) for plan in plans)]) + "\n"


def line(plan: Value) -> str:
    """One plan as a row of `COLUMNS`."""
    memory, flops, seconds = plan["memory"], plan["flops"], plan["seconds"]
    told = "" if plan["compiled"] else " (analysis)"
    where = f"{plan['topology']} {mesh_words(plan)}"
    name = f"{plan['config']}, {where}, {plan['method']} {plan['stage'] or plan['what']}{told}"
    cells = (
        name,
        f"{batch_words(plan)}, {plan['remat']}",
        f"{memory['argument'] / GIB:.1f} + {memory['temporary'] / GIB:.1f}",
        f"{memory['total'] / memory['hbm']:.0%}",
        "yes" if plan["fits"] else "no",
        f"{flops['model'] / 1e12:.1f} / {flops['compiled'] / 1e12:.1f}",
        f"{flops['ratio']:.2f}",
        f"{plan['payload'] / 1e9:.1f}",
        f"{plan['wire'] / 1e9:.1f}",
        f"{seconds['compute'] * 1e3:.0f}",
        f"{seconds['memory'] * 1e3:.0f}",
        f"{seconds['network_all_links'] * 1e3:.0f} / {seconds['network_own_links'] * 1e3:.0f}",
        plan["bound"],
        f"{plan['mfu_ceiling']:.0%}",
        f"{plan['images_per_second']:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------------------------- page


def write_page(page: Path, folder: Path) -> int:
    """Put the plans of a folder's JSON files behind the mark in a page; returns how many.

    Files in the order of their names; plans of one file stay together. ValueError where the page
    has no mark or the folder no plans.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no plans: write some with --json {folder}/NAME.json")
    text = page.read_text(encoding="utf-8")
    if MARK not in text:
        raise ValueError(f"{page} has no line {MARK!r}: put it where the plans should stand")
    plans = [as_list(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    parts = [section(path.stem, group) for path, group in zip(files, plans, strict=True)]
    write_text(page, text.partition(MARK)[0] + MARK + "\n\n" + "\n".join(parts))
    return sum(map(len, plans))


def section(name: str, plans: Sequence[Value]) -> str:
    """One file's plans: the command that made them, and their rows."""
    commands = list(dict.fromkeys(plan["command"] for plan in plans))
    said = "\n".join(["```", *commands, "```"])
    return f"### {name}\n\n{said}\n\n{lines(plans)}"


def as_list(value: Any) -> list[Value]:
    """A file holds one plan, or several."""
    return value if isinstance(value, list) else [value]


# --------------------------------------------------------------------------------- words


def mesh_words(plan: Value) -> str:
    """`fsdp=64,tensor=4`: axes of size 1 left out."""
    axes = [f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1]
    return ",".join(axes) or "one device"


def batch_words(plan: Value) -> str:
    """`128`, or `2 x 64` for a step of two batches."""
    count, images = plan["accumulate"], plan["batch"]
    return f"{images}" if count == 1 else f"{count} x {images // count}"


def gib(amount: float) -> str:
    return f"{amount / GIB:.2f} GiB"


def giga(amount: float) -> str:
    return f"{amount / 1e9:.2f} GB"


def tera(amount: float) -> str:
    return f"{amount / 1e12:.2f} T"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
