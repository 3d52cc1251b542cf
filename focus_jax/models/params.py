"""Parameters by name: the canonical flat tree that serves every method."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from focus_jax.compress.method import Method
from focus_jax.config import ModelConfig
from focus_jax.models.decoder import spans
from focus_jax.models.lora import is_lora
from focus_jax.models.vlm import VLM
from focus_jax.sharding import Layout, name_of

STAGE = re.compile(r"^decoder\.stages\.(\d+)\.(?:(\d+)\.)?(.*)$")
LAYERS = "decoder.layers."

# A parameter of the decoder's layers: stacked [L, ...], or a list with an array for each.
Leaf = Any


def named_leaves(model: Any) -> dict[str, Any]:
    """Every array of a model by its name, stages still apart."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def with_leaves(model: VLM, leaves: Mapping[str, Any]) -> VLM:
    """The same model holding other arrays."""
    flat, tree = jax.tree_util.tree_flatten_with_path(model)
    return jax.tree.unflatten(tree, [leaves[name_of(path)] for path, _ in flat])


def canonical(leaves: Mapping[str, Any]) -> dict[str, Leaf]:
    """Join the stages: `decoder.layers.*` with all layers stacked [L, ...].

    Layers that stand apart come as lists of arrays, and nothing is copied.
    Works for anything with those names: parameters, gradients, optimiser moments, shapes.
    """
    out: dict[str, Leaf] = {}
    parts: dict[str, dict[tuple[int, int], Any]] = {}
    apart = False
    for name, leaf in leaves.items():
        if match := STAGE.match(name):
            stage, layer, rest = match.groups()
            apart |= layer is not None
            parts.setdefault(LAYERS + rest, {})[int(stage), int(layer or 0)] = leaf
        else:
            out[name] = leaf
    for name, pieces in parts.items():
        ordered = [pieces[at] for at in sorted(pieces)]
        out[name] = ordered if apart else join(ordered)
    return out


def join(pieces: list[Any]) -> Any:
    """Concatenate stages along the layer axis; shapes where there are no values."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], jax.ShapeDtypeStruct):
        layers = sum(p.shape[0] for p in pieces)
        return jax.ShapeDtypeStruct((layers, *pieces[0].shape[1:]), pieces[0].dtype)
    return jnp.concatenate(pieces)


def staged(
    tree: Mapping[str, Leaf], bounds: tuple[int, ...], stacked: bool = True
) -> dict[str, Any]:
    """Split `decoder.layers.*` into stages that begin at `bounds`; the inverse of `canonical`.

    Lists of layers that stay apart are not copied.
    """
    out: dict[str, Any] = {}
    for name, leaf in tree.items():
        if not name.startswith(LAYERS):
            out[name] = leaf
            continue
        rest = name.removeprefix(LAYERS)
        for i, (a, b) in enumerate(spans(bounds, len(leaf))):
            place, piece = f"decoder.stages.{i}", leaf[a:b]
            if stacked:
                out[f"{place}.{rest}"] = jnp.stack(piece) if isinstance(piece, list) else piece
            else:
                out |= {f"{place}.{j}.{rest}": layer for j, layer in enumerate(piece)}
    return out


def abstract(cfg: ModelConfig, method: Method, layout: Layout | None = None) -> VLM:
    """The model's structure with shapes instead of values; allocates nothing."""
    return nnx.eval_shape(lambda: VLM(cfg, method, rngs=nnx.Rngs(0), layout=layout))


def initialise(cfg: ModelConfig, method: Method, seed: int, layout: Layout | None = None) -> VLM:
    """A model with fresh parameters, made in one compiled program, each where it is kept."""
    make = lambda: VLM(cfg, method, rngs=nnx.Rngs(seed), layout=layout)  # noqa: E731
    if layout is None:
        return jax.jit(make)()
    shape = abstract(cfg, method, layout)
    shardings = stored(named_leaves(shape), layout)
    return with_leaves(shape, jax.jit(lambda: named_leaves(make()), out_shardings=shardings)())


def fresh_leaves(
    cfg: ModelConfig, method: Method, seed: int, wanted: Iterable[str], layout: Layout
) -> dict[str, Leaf]:
    """Those of a fresh model's canonical parameters that are wanted; the others are never made."""
    wanted = list(wanted)

    def make() -> dict[str, Any]:
        leaves = canonical(named_leaves(VLM(cfg, method, rngs=nnx.Rngs(seed), layout=layout)))
        return {name: leaves[name] for name in wanted}

    if not wanted:
        return {}
    return jax.jit(make, out_shardings=stored(jax.eval_shape(make), layout))()


def canonical_name(name: str) -> str:
    """`decoder.layers.q.kernel` for `decoder.stages.1.q.kernel`."""
    match = STAGE.match(name)
    return LAYERS + match[3] if match else name


def stored(leaves: Mapping[str, Any], layout: Layout) -> dict[str, NamedSharding]:
    """Where each array of named leaves is kept; also gradients and shapes."""
    return {k: layout.stored(canonical_name(k), leaf.shape) for k, leaf in leaves.items()}


def place(leaves: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Named leaves where they are kept."""
    return jax.device_put(dict(leaves), stored(leaves, layout))


def is_sampler(name: str) -> bool:
    """Whether a parameter belongs to a method rather than to the base model."""
    return name.startswith("samplers.")


def with_method(
    cfg: ModelConfig,
    tree: Mapping[str, Leaf],
    method: Method,
    init: Callable[[], Any] | None = None,
    layout: Layout | None = None,
) -> VLM:
    """A model for `method` from a canonical tree made by any method.

    Samplers that the method does not have are left out. A learned method whose weights the tree
    lacks is an error, unless `init` makes a model, or {"samplers": ...}, to take them from.
    """
    shape = abstract(cfg, method, layout)
    base = {k: v for k, v in tree.items() if not is_sampler(k)}
    leaves = staged(base, method.bounds, cfg.stacked)
    wanted = named_leaves(shape)
    make = None if init is None else lambda names: pick(named_leaves(init()), names)
    leaves |= samplers_of(tree, wanted, method, make)
    check_same(wanted, leaves)
    return with_leaves(shape, leaves if layout is None else place(leaves, layout))


def pick(leaves: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: leaves[name] for name in names}


def samplers_of(
    tree: Mapping[str, Leaf],
    wanted: Mapping[str, Any],
    method: Method,
    init: Callable[[list[str]], dict[str, Any]] | None,
) -> dict[str, Leaf]:
    """A method's samplers among `wanted`, from a tree; `init` makes those that it lacks.

    ValueError where some are lacking and there is no `init`.
    """
    samplers = {k: v for k, v in tree.items() if is_sampler(k) and k in wanted}
    lacking = [k for k in wanted if is_sampler(k) and not fits(samplers.get(k), wanted[k])]
    if lacking and init is None:
        raise ValueError(
            f"method {method.name!r} is learned, and the checkpoint has no weights for "
            f"{lacking[0]} {tuple(wanted[lacking[0]].shape)}: train with it, ask for "
            "--init-samplers random, or use gate='measured', which learns nothing"
        )
    return samplers | init(lacking) if lacking and init is not None else samplers


def fits(leaf: Any, wanted: Any) -> bool:
    return leaf is not None and tuple(leaf.shape) == tuple(wanted.shape)


def check_same(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """ValueError naming the first parameter that differs, with both shapes."""
    for name in sorted(wanted.keys() | found.keys()):
        need = shape_of(wanted[name]) if name in wanted else None
        have = shape_of(found[name]) if name in found else None
        if need != have:
            mend = "load it with the model config it was trained with"
            if is_lora(canonical_name(name)) and need is None:
                mend = "add them to the kernels first (models.lora.merged), or set model.lora"
            elif is_lora(canonical_name(name)) and have is None:
                mend = "set model.lora.rank to 0, or start training from it (train.init_from)"
            raise ValueError(
                f"parameters differ at {name}: the model needs {words(need)}, the checkpoint "
                f"has {words(have)}; {mend}"
            )


def shape_of(leaf: Leaf) -> tuple[int, ...]:
    """The shape of a parameter, with L for layers that stand apart."""
    if isinstance(leaf, list):
        return (len(leaf), *shape_of(leaf[0]))
    return tuple(leaf.shape)


def words(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)
