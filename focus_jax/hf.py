"""Checkpoints in and out: Hugging Face's LLaVA and LLaVA-NeXT, the original's, and CLIP + Llama.

Only safetensors are read, nothing is unpickled, and no code of a checkpoint is run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from focus_jax import hf_config, hf_names
from focus_jax import safetensors_io as io
from focus_jax.config import DTypeName, ModelConfig
from focus_jax.hf_write import (
    DTYPES,
    METHOD,
    SAMPLERS,
    DTypeOut,
    existing,
    export,
    shapes,
    write,
)
from focus_jax.models.params import LAYERS, Leaf, is_sampler, name_of
from focus_jax.models.projector import Projector

__all__ = [
    "DTYPES", "DTypeOut", "export", "image_token", "read", "read_config", "read_method",
    "read_parts", "resolve", "write",
]  # fmt: skip
Tree = dict[str, Leaf]
Where = Callable[[str, tuple[int, ...]], Sharding]
# What comes with a model beside its weights; never *.bin, never code.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


# ------------------------------------------------------------------------------ names


def resolve(name: str | Path) -> Path:
    """A checkpoint's directory: a local one, or downloaded from Hugging Face's hub.

    `llava-1.5-7b-hf` means `llava-hf/llava-1.5-7b-hf`. An existing directory never touches the
    network. FileNotFoundError: neither a directory nor to be had from the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise FileNotFoundError(f"there is no directory {path}")
    repository = text if "/" in text else f"llava-hf/{text}"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{text!r} is no directory here, and {repository} could not be had from the hub "
            f"({type(error).__name__}): check the name and the network, or download it elsewhere "
            f"with `hf download {repository}` and give the directory"
        ) from error


# ------------------------------------------------------------------------------ reading


def read_config(directory: str | Path, vision_tower: str | Path | None = None) -> ModelConfig:
    """The model of a directory, without its weights. Errors as in `hf_config.describe`."""
    return described(existing(directory), vision_tower).config


def image_token(directory: str | Path) -> int | None:
    """The id that stands for an image; None in original checkpoints, which have none."""
    text = hf_config.read_json(existing(directory) / "config.json")
    if "text_config" not in text:
        return None
    return described(existing(directory), None).image_token


def described(directory: Path, vision_tower: str | Path | None) -> hf_config.Described:
    tower = None if vision_tower is None else existing(vision_tower)
    return hf_config.describe(directory, tower)


def read(
    directory: str | Path,
    *,
    param_dtype: DTypeName = "float32",
    compute_dtype: DTypeName | None = None,
    vision_tower: str | Path | None = None,
    sharding: Where | None = None,
    stacked: bool = True,
    workers: int = 4,
) -> tuple[ModelConfig, Tree]:
    """A checkpoint as its config and the canonical tree that `with_method` takes.

    compute_dtype: None is param_dtype. vision_tower: CLIP's directory, for original checkpoints.
    sharding(name, shape): where a parameter lies; None is jax's default device. stacked: the
    decoder's layers are stacked, else a list of arrays each (see `ModelConfig.stacked`).
    A compressed model's learned parts come along, in the dtype they have.
    Memory of the host peaks at the parameters and a few blocks of 2 MiB. FileNotFoundError and
    ValueError as in `hf_config.describe` and `safetensors_io.directory_entries`; ValueError:
    tensors that are missing, unexpected or of another shape, all together.
    """
    directory = existing(directory)
    said = described(directory, vision_tower)
    cfg = replace(
        said.config, param_dtype=param_dtype, compute_dtype=compute_dtype or param_dtype,
        stacked=stacked,
    )  # fmt: skip
    entries = list(io.directory_entries(directory).values())
    if said.layout == "original" and not any(is_tower(e.name) for e in entries):
        entries += tower_entries(named_tower(directory, vision_tower))
    tree = load(cfg, entries, shapes(cfg), directory, sharding, workers)
    return cfg, tree | read_samplers(directory, sharding)


def read_parts(
    decoder: str | Path,
    clip: str | Path,
    *,
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu",
    feature_layer: int = -2,
    grids: tuple[tuple[int, int], ...] = (),
    seed: int | None = None,
    param_dtype: DTypeName = "float32",
    compute_dtype: DTypeName | None = None,
    sharding: Where | None = None,
    workers: int = 4,
) -> tuple[ModelConfig, Tree]:
    """A text-only Llama and a CLIP, to begin training.

    grids: (rows, cols) of tiles, which makes a LLaVA-NeXT; () is one view an image.
    seed: of a fresh projector (and newline); None leaves them out. Errors as in `read`.
    """
    decoder, clip = existing(decoder), existing(clip)
    cfg = ModelConfig(
        vision=replace(hf_config.tower_config(clip), feature_layer=feature_layer),
        decoder=hf_config.text_config(decoder),
        projector=projector,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype or param_dtype,
    )
    if grids:
        most = 1 + max(rows * cols for rows, cols in grids)
        cfg = replace(cfg, max_tiles=most, grids=grids, image_newline=True)
    entries = [*io.directory_entries(decoder).values(), *tower_entries(clip)]
    read_here = ("decoder.", "vision.")
    wanted = {name: leaf for name, leaf in shapes(cfg).items() if name.startswith(read_here)}
    tree = load(cfg, entries, wanted, decoder, sharding, workers)
    if seed is not None:
        tree |= {name: placed(np.asarray(a), name, sharding) for name, a in fresh(cfg, seed)}
    return cfg, tree


def fresh(cfg: ModelConfig, seed: int) -> Iterator[tuple[str, jax.Array]]:
    """The parameters between tower and decoder, before any training."""
    rngs = nnx.Rngs(seed)
    dtype = jnp.dtype(cfg.param_dtype)
    module = Projector(
        cfg.projector, cfg.vision.width, cfg.decoder.width,
        dtype=jnp.dtype(cfg.compute_dtype), param_dtype=dtype, rngs=rngs,
    )  # fmt: skip
    for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]:
        yield f"projector.{name_of(path)}", leaf
    if cfg.image_newline:
        line = jax.random.normal(rngs.params(), (cfg.decoder.width,)) * 0.02
        yield "image_newline", line.astype(dtype)


def is_tower(name: str) -> bool:
    place = hf_names.place_of(name)
    return place is not None and place.ours.startswith("vision.")


def named_tower(directory: Path, vision_tower: str | Path | None) -> Path:
    """CLIP's directory for an original checkpoint that has no tower inside."""
    if vision_tower is not None:
        return existing(vision_tower)
    name = hf_config.read_json(directory / "config.json").get("mm_vision_tower")
    if name and Path(name).is_dir():
        return Path(name)
    raise ValueError(
        f"{directory} has no vision tower inside and names {name!r} (mm_vision_tower): download "
        "that, and give its directory as vision_tower="
    )


def tower_entries(directory: Path) -> list[io.Entry]:
    """The tensors of CLIP's vision half."""
    found = io.directory_entries(directory).values()
    return [e for e in found if not hf_names.CLIP_TEXT.fullmatch(e.name)]


def load(
    cfg: ModelConfig,
    entries: Iterable[io.Entry],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    directory: Path,
    sharding: Where | None,
    workers: int,
) -> Tree:
    """Check everything, then read one parameter at a time."""
    sources = matched(cfg, list(entries), wanted, directory)
    tree: Tree = {}
    with ThreadPoolExecutor(workers) as pool:
        for name, leaf in wanted.items():
            if cfg.stacked or not name.startswith(LAYERS):
                host = gathered(leaf.shape, leaf.dtype, name, sources[name], pool)
                tree[name] = placed(host, name, sharding)
                continue
            tree[name] = []
            for layer in range(leaf.shape[0]):
                own: dict[int | None, io.Entry] = {None: sources[name][layer]}
                host = gathered(leaf.shape[1:], leaf.dtype, name, own, pool)
                tree[name].append(placed(host, name, sharding))
    return tree


def gathered(
    shape: tuple[int, ...],
    dtype: Any,
    name: str,
    sources: Mapping[int | None, io.Entry],
    pool: Executor,
) -> np.ndarray:
    """A parameter on the host, its layers stacked [L, ...] where `sources` names some."""
    out = io.aligned(shape, np.dtype(dtype))
    turn = hf_names.transform_of(name)
    jobs = [
        pool.submit(io.copy_rows, out if i is None else out[i], entry, turn, first, last)
        for i, entry in sources.items()
        for first, last in io.blocks(entry)
    ]
    for job in jobs:
        job.result()
    return out


def placed(host: np.ndarray, name: str, sharding: Where | None) -> jax.Array:
    """A host array on its devices: on a CPU without a copy, `io.aligned` having made it."""
    if sharding is None:
        return jax.device_put(host, may_alias=True)
    where = sharding(name, host.shape)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def matched(
    cfg: ModelConfig,
    entries: list[io.Entry],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    directory: Path,
) -> dict[str, dict[int | None, io.Entry]]:
    """Each parameter's tensors by layer. ValueError listing all that does not fit."""
    sources: dict[str, dict[int | None, io.Entry]] = {name: {} for name in wanted}
    unexpected, twice, shaped, dtyped = [], [], [], []
    tied: list[io.Entry] = []
    for entry in entries:
        place = hf_names.place_of(entry.name)
        if place is None or place.ours not in wanted:
            if place is not None and is_tied_head(cfg, place):
                tied.append(entry)
            elif not hf_names.LEFTOVERS.fullmatch(entry.name):
                unexpected.append(entry.name)
            continue
        need = wanted[place.ours].shape
        if place.layer is not None and place.layer >= need[0]:
            unexpected.append(entry.name)
            continue
        if place.layer in sources[place.ours]:
            twice.append(f"{entry.name} and {sources[place.ours][place.layer].name}")
        sources[place.ours][place.layer] = entry
        there = hf_names.shape_there(need if place.layer is None else need[1:], place.transform)
        if entry.shape != there:
            shaped.append(f"{entry.name} {list(entry.shape)} instead of {list(there)}")
        if entry.dtype not in io.FLOATS:
            dtyped.append(f"{entry.name} {entry.dtype}")
    missing = [
        hf_names.name_there(name, layer)
        for name, leaf in wanted.items()
        for layer in (range(leaf.shape[0]) if hf_names.has_layers(name) else [None])
        if layer not in sources[name]
    ]
    report(
        directory,
        {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape than config.json says": shaped,
            "given twice": twice,
            f"of a dtype other than {', '.join(io.FLOATS)}": dtyped,
        },
    )
    for entry in tied:
        same_as_embedding(entry, sources["decoder.embed.embedding"][None])
    return sources


def report(directory: Path, faults: Mapping[str, list[str]]) -> None:
    """ValueError with every kind of fault there is."""
    lines = [f"  {len(f)} {what}: {io.listed(f)}" for what, f in faults.items() if f]
    if lines:
        raise ValueError(
            f"the tensors of {directory} are not those of its config.json:\n" + "\n".join(lines)
        )


def is_tied_head(cfg: ModelConfig, place: hf_names.Place) -> bool:
    return cfg.decoder.tie_embeddings and place.ours == "decoder.head.kernel"


def same_as_embedding(head: io.Entry, embedding: io.Entry) -> None:
    """ValueError unless a head that is stored though tied equals the embedding, bit for bit."""
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or any(
        io.read_rows(head, *rows).tobytes() != io.read_rows(embedding, *rows).tobytes()
        for rows in io.blocks(head)
    ):
        raise ValueError(
            f"{head.file} has {head.name}, which differs from {embedding.name}, though config.json "
            "ties them: set tie_word_embeddings to false"
        )


# ------------------------------------------------------------------------------ learned parts


def read_samplers(directory: Path, sharding: Where | None = None) -> Tree:
    """The learned parts beside a base model; {} where there are none."""
    file = directory / SAMPLERS
    if not file.exists():
        return {}
    tree = {}
    for name, entry in io.file_entries(file).items():
        if not is_sampler(name) or entry.dtype not in io.FLOATS:
            raise ValueError(f"{file} has {name} {entry.dtype}: only floating `samplers.*` belong")
        host = io.aligned(entry.shape, io.FLOATS[entry.dtype])
        host[...] = io.read_rows(entry, 0, entry.shape[0] if entry.shape else 1).reshape(host.shape)
        tree[name] = placed(host, name, sharding)
    return tree


def read_method(directory: str | Path) -> dict[str, Any] | None:
    """What `export` was told of the method; None for a base model."""
    file = existing(directory) / METHOD
    return hf_config.read_json(file) if file.exists() else None
