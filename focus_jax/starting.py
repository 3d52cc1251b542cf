"""Where training starts from: a run, a LLaVA checkpoint, or a decoder with or without a tower.

`train.init_from` is one of
- a run of train.py: its workdir, its `checkpoints` folder, or one step in there;
- a LLaVA directory, of Hugging Face's or the original, or one that `Pipeline.save` wrote;
- `decoder=DIR,vision=DIR`: a text-only Llama and a CLIP, and what stands between them is fresh; or
  an original LLaVA that only names its tower, and that tower;
- `decoder=DIR`: a text-only Llama alone, and all else is fresh, as in a run from nothing.
"""

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple

from focus_jax import hf, hf_decoder
from focus_jax.checkpoint import load_meta, load_params
from focus_jax.compress.baselines import full
from focus_jax.config import LoraConfig, ModelConfig
from focus_jax.experiment import Experiment, from_json
from focus_jax.hf_config import read_json, text_config, tower_config
from focus_jax.models.lora import has_lora, merged
from focus_jax.models.params import Leaf, abstract, canonical, fresh_leaves, named_leaves
from focus_jax.sharding import Layout

FORMS = (
    "a run of train.py, a LLaVA directory (Hugging Face's or the original), "
    "decoder=DIR,vision=DIR or decoder=DIR"
)
# What a model is, and not how it is run.
SIZES = ("vision", "decoder", "projector", "image_newline")


class Parts(NamedTuple):
    """Directories of a decoder and of a tower; without one, the tower is fresh."""

    decoder: Path
    vision: Path | None = None


def parts_of(text: str) -> Parts | None:
    """What `decoder=DIR,vision=DIR` or `decoder=DIR` names; None for a text that is one path.

    ValueError for anything else that begins like them.
    """
    if not text.startswith(("decoder=", "vision=")):
        return None
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    found = dict(pairs)
    wanted = {"decoder"}, set(Parts._fields)
    if set(found) not in wanted or len(pairs) > len(found) or not all(found.values()):
        raise ValueError(f"train.init_from={text!r}: write decoder=DIR,vision=DIR or decoder=DIR")
    return Parts(**{part: Path(folder).expanduser() for part, folder in found.items()})


def is_whole(parts: Parts) -> bool:
    """Whether the decoder is a LLaVA, which has all but the tower.

    ValueError where no tower is named for it.
    """
    kind = read_json(parts.decoder / "config.json").get("model_type")
    whole = str(kind).startswith("llava")
    if whole and parts.vision is None:
        raise ValueError(
            f"train.init_from: {parts.decoder} is a LLaVA (model_type {kind!r}), not a decoder "
            "alone: give the directory without decoder=, or with vision=DIR beside it"
        )
    return whole


def is_llava(path: Path) -> bool:
    """Whether a directory is a LLaVA checkpoint rather than a run."""
    file = path / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def run_folder(path: Path) -> Path:
    """The folder with a run's parameters. FileNotFoundError names all that may be given."""
    if not path.is_dir():
        raise FileNotFoundError(f"train.init_from: there is no directory {path}: give {FORMS}")
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


# ------------------------------------------------------------------------------ the model


def checkpoint_model(text: str, own: ModelConfig) -> ModelConfig | None:
    """`own` with the sizes of the checkpoint that `init_from` names; None where it tells none.

    Dtypes, attention, rematerialisation and low-rank updates stay `own`, as do the initialisation
    of fresh weights and how images may be tiled, unless the checkpoint's newline settles that.
    A decoder alone says nothing of tower, projector and newline, which stay `own` too.
    """
    parts, path = parts_of(text), Path(text).expanduser()
    if parts is not None and is_whole(parts):
        found = hf.read_config(parts.decoder, parts.vision)
    elif parts is not None:
        found = replace(own, decoder=text_config(parts.decoder))
        if parts.vision is not None:
            tower = replace(tower_config(parts.vision), feature_layer=own.vision.feature_layer)
            found = replace(found, vision=tower)
    elif is_llava(path):
        found = hf.read_config(path)
    else:
        config = run_config(run_folder(path))
        if config is None:
            return None
        found = config.model
    vision = replace(found.vision, position_init=own.vision.position_init)
    decoder = replace(found.decoder, init=own.decoder.init)
    tiles = found if found.image_newline != own.image_newline else own
    return replace(
        own, vision=vision, decoder=decoder, projector=found.projector,
        image_newline=found.image_newline, max_tiles=tiles.max_tiles, grids=tiles.grids,
    )  # fmt: skip


def run_config(folder: Path) -> Experiment | None:
    """The experiment that a run's checkpoint belongs to; None where it does not say."""
    text = load_meta(folder).get("config")
    return None if text is None else from_json(text, f"{folder} (meta)")


def check_model(text: str, own: ModelConfig, vocabulary: bool = True) -> None:
    """ValueError naming the first size that a checkpoint and the config do not share.

    vocabulary: whether its size counts as well; a tokenizer may still settle it.
    """
    found = checkpoint_model(text, own)
    if found is None:
        return
    if not vocabulary:
        found = replace(found, decoder=replace(found.decoder, vocab_size=own.decoder.vocab_size))
    for name, theirs, ours in sizes_that_differ(found, own):
        raise ValueError(
            f"train.init_from={text}: the checkpoint has model.{name} {theirs}, the config "
            f"{ours}: set --model.{name} {theirs}, or take all sizes from it with "
            "--model-from-checkpoint"
        )


def sizes_that_differ(one: ModelConfig, other: ModelConfig) -> list[tuple[str, object, object]]:
    """(name, one's, the other's) of sizes, in the order of the config."""
    out: list[tuple[str, object, object]] = []
    for part in SIZES:
        pairs = [(part, getattr(one, part), getattr(other, part))]
        if is_dataclass(pairs[0][1]):
            names = [f.name for f in fields(pairs[0][1])]
            pairs = [(f"{part}.{n}", *(getattr(v, n) for v in pairs[0][1:])) for n in names]
        out += [pair for pair in pairs if not same(*pair[1:])]
    return out


def same(a: object, b: object) -> bool:
    """Equal, but for the last digit of a number that was written and read."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(same(*pair) for pair in zip(a, b, strict=True))
    return a == b


def with_checkpoint_model(cfg: Experiment) -> Experiment:
    """An experiment whose model has the sizes of what it starts from. ValueError where it cannot.

    For config programs, and what `train.py --model-from-checkpoint` does.
    """
    found = checkpoint_model(cfg.train.init_from, cfg.model) if cfg.train.init_from else None
    if found is None:
        raise ValueError(
            f"train.init_from={cfg.train.init_from!r} tells no model's sizes: give {FORMS}"
        )
    return replace(cfg, model=found)


# ------------------------------------------------------------------------------ parameters


def read_start(text: str, own: ModelConfig, layout: Layout, seed: int) -> dict[str, Leaf]:
    """The canonical parameters that `init_from` names, each read straight to where it lies.

    Samplers come along. Low-rank updates too where they are as `own` has them; others are added to
    their kernels. seed: of what is fresh (projector and newline; for a decoder alone the tower
    too, as in a run from nothing). FileNotFoundError, ValueError for what is not there or does not
    fit.
    """
    check_model(text, own)
    parts, path = parts_of(text), Path(text).expanduser()
    if parts is not None and is_whole(parts):
        return hf.read(
            parts.decoder, vision_tower=parts.vision, param_dtype=own.param_dtype,
            sharding=layout.stored,
        )[1]  # fmt: skip
    if parts is not None:
        return read_parts(parts, own, layout, seed)
    if is_llava(path):
        return hf.read(path, param_dtype=own.param_dtype, sharding=layout.stored)[1]
    folder = run_folder(path)
    tree, _ = load_params(folder, place=layout.stored)
    config = run_config(folder)
    theirs = LoraConfig() if config is None else config.model.lora
    return merged(tree, theirs) if has_lora(tree) and theirs != own.lora else tree


def read_parts(parts: Parts, own: ModelConfig, layout: Layout, seed: int) -> dict[str, Leaf]:
    """A text-only decoder with a tower and a fresh projector, or with all else fresh."""
    if parts.vision is not None:
        return hf.read_parts(
            parts.decoder, parts.vision, projector=own.projector,
            feature_layer=own.vision.feature_layer, seed=seed, param_dtype=own.param_dtype,
            grids=own.grids if own.image_newline else (), sharding=layout.stored,
        )[1]  # fmt: skip
    decoder = hf_decoder.read(
        parts.decoder, param_dtype=own.param_dtype, sharding=layout.stored
    )[1]  # fmt: skip
    # Tower and projector are drawn before a decoder and samplers: these decide nothing of them.
    base = canonical(named_leaves(abstract(own, full())))
    lacking = [name for name in base if not name.startswith("decoder.")]
    return decoder | fresh_leaves(own, full(), seed, lacking, layout)
