"""Compression methods by their names on a command line: `prumerge_plus+fastv:keep=0.5`.

A method is a function; its arguments are checked against the function's signature. A module of
`compress/` lists its functions as `METHODS`; a line in `MODULES` makes them known here, as
`focus_jax.methods.NAME` too.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from focus_jax.compress import (
    baselines,
    cdpruner,
    divprune,
    fastv,
    prumerge,
    pyramiddrop,
    sparsevlm,
    text_guided,
    trimtokenator,
    vision_guided,
    visionzip,
    visual_compute,
    vtw,
    yopo,
)
from focus_jax.compress.focusllava import focusllava as focusllava_of
from focus_jax.compress.method import Cut, Method, VisionStage, compose
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.compress.visual_compute import VisualCompute
from focus_jax.experiment import CompressConfig, parent_fields

# Adding a method: its file in compress/, and its module here.
MODULES: tuple[ModuleType, ...] = (
    baselines,
    prumerge,
    visionzip,
    divprune,
    cdpruner,
    trimtokenator,
    fastv,
    pyramiddrop,
    sparsevlm,
    vtw,
    yopo,
)

METHODS: dict[str, Callable[..., Method]] = {
    function.__name__: function for module in MODULES for function in module.METHODS
}
# Which of the config's samplers stand in FocusLLaVA and in its two halves.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "focusllava": ("vision", "text"),
    "vision_only": ("vision",),
    "text_only": ("text",),
}
NAMES = (*METHODS, *SAMPLERS)


def __getattr__(name: str) -> Callable[..., Method]:
    """The function of that name: `focus_jax.methods.fastv(keep=0.25)`."""
    if name in METHODS:
        return METHODS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_method(text: str, compress: CompressConfig) -> Method:
    """The method that `name` or `name:argument=value,...` stands for; `a+b` is both at once.

    `focusllava`, `vision_only` and `text_only` take the config's samplers, whether switched on or
    not, and overrides such as `vision.budget=64,text.layer=1`; the items of a tuple stand apart
    by "/" (`vision.scales=4/2/1`). ValueError: a name, an argument or a value that does not fit.
    """
    if "+" in text:
        return compose(*(parse_method(part, compress) for part in text.split("+")))
    name, _, rest = text.strip().partition(":")
    given = arguments(name, rest)
    if name in METHODS:
        hints = get_type_hints(METHODS[name])
        wanted = {key: hints[key] for key in inspect.signature(METHODS[name]).parameters}
        return METHODS[name](**converted(name, given, wanted))
    if name in SAMPLERS:
        return sampled(name, given, compress)
    raise ValueError(f"unknown method {name!r}: {choose(name, NAMES)}")


def sampled(name: str, given: Mapping[str, str], compress: CompressConfig) -> Method:
    """FocusLLaVA, or one half of it, from the config's samplers with overrides."""
    values: dict[str, Any] = {
        "vision": VisionGuided(**parent_fields(compress.vision, VisionGuided)),
        "text": TextGuided(**parent_fields(compress.text, TextGuided)),
    }
    parts = {part: values[part] for part in SAMPLERS[name]}
    hints = {part: get_type_hints(type(value)) for part, value in parts.items()}
    wanted = {f"{p}.{f.name}": hints[p][f.name] for p, v in parts.items() for f in fields(v)}
    changes = converted(name, given, wanted)
    for part, value in parts.items():
        start = f"{part}."
        mine = {k.removeprefix(start): v for k, v in changes.items() if k.startswith(start)}
        parts[part] = replace(value, **mine)
    return focusllava_of(**parts)


def focusllava(
    vision: VisionGuided | None = VisionGuided(),  # noqa: B008 a frozen value
    text_layer: int | None = 16,
    keep: float = 0.25,
    **text: Any,
) -> Method:
    """FocusLLaVA from flat arguments.

    vision: the vision-guided sampler, or None. text_layer: the decoder layer at whose entry the
    text-guided sampler keeps a share of the visual tokens; None for no such sampler. text: other
    fields of `TextGuided`.
    """
    if text_layer is None:
        return focusllava_of(vision)
    cut = TextGuided(layer=text_layer, keep=keep, **text)
    return focusllava_of(vision, cut)


def parts_of(module: ModuleType) -> dict[str, type]:
    """The kinds of vision stage, cut and visual compute that a module defines."""
    kinds = (VisionStage, Cut, VisualCompute)
    classes = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, kinds))
    return {c.__name__: c for c in classes if c.__module__ == module.__name__}


# The classes whose values a method consists of, by the names that they are saved under.
PARTS: dict[str, type] = {
    name: part
    for module in (vision_guided, text_guided, visual_compute, *MODULES)
    for name, part in parts_of(module).items()
}


def method_to_json(method: Method) -> dict[str, Any]:
    """A method as plain JSON values: its name and all of its parts with all fields."""
    return {
        "name": method.name,
        "vision": part_to_json(method.vision),
        "cuts": [part_to_json(cut) for cut in method.cuts],
        "compute": part_to_json(method.compute) if method.compute else None,
    }


def part_to_json(part: Any) -> dict[str, Any]:
    """One part's class and fields."""
    return {"kind": type(part).__name__} | TypeAdapter(type(part)).dump_python(part, mode="json")


def method_from_json(values: Mapping[str, Any], where: str = "method.json") -> Method:
    """The method that `method_to_json` described. ValueError naming what does not fit."""
    missing = {"name", "vision", "cuts"} - set(values)
    if missing:
        raise ValueError(f"{where} lacks {sorted(missing)}: it does not describe a method")
    vision = part_from_json(values["vision"], where)
    cuts = tuple(part_from_json(cut, where) for cut in values["cuts"])
    compute = values.get("compute")
    spent = part_from_json(compute, where) if compute else None
    return Method(values["name"], vision, cuts, spent)


def part_from_json(values: Mapping[str, Any], where: str) -> Any:
    """One part from its class and fields."""
    kind = values.get("kind", "")
    if kind not in PARTS:
        raise ValueError(f"{where} names an unknown part {kind!r}: {choose(kind, PARTS)}")
    known = {f.name for f in fields(PARTS[kind])}
    unknown = set(values) - known - {"kind"}
    if unknown:
        raise ValueError(f"{where}: {kind} has no field {sorted(unknown)}; it has {sorted(known)}")
    try:
        given = {key: value for key, value in values.items() if key != "kind"}
        return TypeAdapter(PARTS[kind]).validate_python(given)
    except ValidationError as error:
        raise ValueError(f"{where}: {kind} does not fit: {error.errors()[0]['msg']}") from error


def arguments(name: str, text: str) -> dict[str, str]:
    """`{"keep": "0.25"}` from `keep=0.25`."""
    out: dict[str, str] = {}
    for piece in text.split(",") if text else ():
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            raise ValueError(f"method {name!r}: {piece!r} is no argument=value")
        if key in out:
            raise ValueError(f"method {name!r}: {key} is given twice: give it once")
        out[key] = value
    return out


def converted(name: str, given: Mapping[str, str], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the types that the method wants."""
    out = {}
    for key, value in given.items():
        if key not in wanted:
            what = choose(key, tuple(wanted)) if wanted else "it takes none"
            raise ValueError(f"method {name!r} has no argument {key!r}: {what}")
        out[key] = convert(name, key, value, wanted[key])
    return out


def convert(name: str, key: str, value: str, kind: Any) -> Any:
    """One value; tuples from items between "/", None from "none"."""
    optional = type(None) in get_args(kind)
    if optional and value.lower() == "none":
        return None
    several = any(get_origin(k) is tuple for k in (kind, *get_args(kind)))
    try:
        return TypeAdapter(kind).validate_python(tuple(value.split("/")) if several else value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"method {name!r}: {key}={value} does not fit: {reason}") from error


def choose(found: str, names: Iterable[str]) -> str:
    """Which names are near `found`, or all of them."""
    names = tuple(names)
    near = get_close_matches(found, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"


def split_methods(text: str) -> list[str]:
    """The methods of a list such as `full,random:keep=0.25,focusllava:text.layer=1,text.keep=0.1`.

    A piece that only says argument=value belongs to the method before it.
    """
    out: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        head, equals, _ = piece.partition("=")
        if equals and ":" not in head and out:
            out[-1] += ("," if ":" in out[-1] else ":") + piece
        else:
            out.append(piece)
    if not out:
        raise ValueError(f"{text!r} names no method: choose from {', '.join(NAMES)}")
    return out
