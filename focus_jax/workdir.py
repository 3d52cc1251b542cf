"""A run's folder: config.json and tokenizer beside the checkpoints, and the data they stand for."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerFast

from focus_jax.data import conversation
from focus_jax.data.dialogue import DialogueSource
from focus_jax.data.dialogue_loader import DialogueLoader
from focus_jax.data.glyphs import vocabulary
from focus_jax.data.loader import Loader, LoaderConfig, make_loader
from focus_jax.data.sources import FreshSource, Source, source
from focus_jax.data.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer
from focus_jax.dialogues import (
    check_stages,
    check_vocabulary,
    dataset_of,
    dialogue_loader,
    has_dialogues,
    open_datasets,
    tokenizer_of,
    with_vocabulary,
)
from focus_jax.dialogues import (
    image_config as image_config,  # from here too
)
from focus_jax.experiment import DataConfig, Experiment, TrainStage, from_json, to_json
from focus_jax.sharding import Layout

CONFIG, TOKENIZER = "config.json", "tokenizer"
# Where a run keeps its things, how often it tells and on what it runs: these may change when it
# goes on. What a folder of dialogues holds is checked by the loader's state.
FREE = (
    "data.directory", "data.dataset", "train.stages.dataset", "train.save_every", "train.keep",
    "train.log_every", "train.devices", "train.mesh", "train.rules",
)  # fmt: skip
TEMPLATES = {template.name: template for template in conversation.TEMPLATES}


def glyph_tokenizer(data: DataConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded data's closed vocabulary."""
    return build_tokenizer((), vocabulary(data.glyphs), ("USER:", "ASSISTANT:"))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def open_workdir(
    cfg: Experiment, workdir: str | Path
) -> tuple[Path, PreTrainedTokenizerFast, Experiment]:
    """Make or reopen a workdir for `cfg`; returns it, the tokenizer and the resolved config.

    The vocabulary's size follows the embedded set's tokenizer; for dialogues the model's own is
    kept, and the tokenizer's files are copied. Process 0 writes, the others return when it has.
    Until there is a checkpoint, another experiment takes the place of the one that failed.
    Raises ValueError when the workdir belongs to another experiment, naming the first field that
    differs, and on every process when it cannot be written.
    """
    workdir = Path(workdir)
    dialogues, begun = has_dialogues(cfg), has_checkpoint(workdir)
    if dialogues:
        check_stages(cfg)
        own = begun and (workdir / TOKENIZER / "tokenizer.json").is_file()
        tokenizer = tokenizer_of(cfg) if not own else load_tokenizer(workdir / TOKENIZER)
    else:
        tokenizer = glyph_tokenizer(cfg.data)
        cfg = with_vocabulary(cfg, len(tokenizer))
    path = workdir / CONFIG
    if begun and path.exists():
        check_same_run(from_json(path.read_text(encoding="utf-8"), str(path)), cfg, path)
    error = write_workdir(workdir, cfg, tokenizer, begun) if jax.process_index() == 0 else None
    # The others wait here, and stop as well where the first could not write.
    if multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
        raise ValueError(
            f"workdir {workdir} cannot be written ({error or 'process 0 tells why'}): give another "
            "--workdir, or free its disk or mend its permissions"
        ) from error
    if dialogues:  # as every later start reads it
        tokenizer = load_tokenizer(workdir / TOKENIZER)
        check_vocabulary(cfg, tokenizer)
    return workdir, tokenizer, cfg


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in the folder has come to a checkpoint: others may not go on in it."""
    return any(step.name.isdecimal() for step in (workdir / "checkpoints").glob("*"))


def write_workdir(
    workdir: Path, cfg: Experiment, tokenizer: PreTrainedTokenizerFast, begun: bool
) -> OSError | None:
    """Write config and tokenizer into the folder, made if need be; returns what went wrong.

    The tokenizer of a run that has `begun` stays.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / CONFIG, to_json(cfg))
        if not begun or not (workdir / TOKENIZER).exists():
            save_tokenizer(tokenizer, workdir / TOKENIZER)
    except OSError as error:
        return error
    return None


def check_same_run(stored: Experiment, asked: Experiment, path: Path) -> None:
    """ValueError naming the first field that differs and shapes the parameters' history."""
    kinds = has_dialogues(stored), has_dialogues(asked)
    if kinds[0] != kinds[1]:  # which data set may change, but not of which kind it is
        old, new = ("dialogues" if kind else "the embedded set" for kind in kinds)
        raise ValueError(
            f"{path} belongs to another run: its data were {old}, are {new}; choose another "
            "--workdir, or use the stored settings"
        )
    for part in ("model", "compress", "data", "train"):
        found = difference(getattr(stored, part), getattr(asked, part), part)
        if found:
            name, old, new = found
            raise ValueError(
                f"{path} belongs to another run: {name} was {old}, is {new}; choose another "
                "--workdir, or use the stored settings"
            )


def difference(old: Any, new: Any, name: str) -> tuple[str, Any, Any] | None:
    """(name, old, new) of the first place where two configs differ, fields in `FREE` left out."""
    if old == new or re.sub(r"\.\d+", "", name) in FREE:
        return None
    parts: list[tuple[str, Any, Any]] = []
    if is_dataclass(old) and type(old) is type(new):
        parts = [
            (f"{name}.{f.name}", *(getattr(c, f.name) for c in (old, new))) for f in fields(old)
        ]
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        parts = [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    if not parts:
        return name, old, new
    return next(filter(None, (difference(a, b, place) for place, a, b in parts)), None)


def read_workdir(workdir: str | Path) -> tuple[Experiment, PreTrainedTokenizerFast]:
    """The config and tokenizer of a run. FileNotFoundError says how to make one."""
    workdir = Path(workdir)
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} is no run: it has no {CONFIG}; make one with "
            "`python train.py --config configs/glyphs_focus.py --workdir DIR`"
        )
    config = from_json(path.read_text(encoding="utf-8"), str(path))
    return config, load_tokenizer(workdir / TOKENIZER)


def train_sources(cfg: Experiment) -> dict[str, Source | DialogueSource]:
    """What the stages train on, by `dataset_of` a stage. Errors as of `open_built`."""
    if has_dialogues(cfg):
        return {**open_datasets(cfg)}
    return {"": data_source(cfg, "train")}


def data_source(cfg: Experiment, split: str, fresh_seed: int | None = None) -> Source:
    """A split of the embedded data, or images made anew from a seed of their own.

    ValueError for an experiment on dialogues, which have no splits.
    """
    if has_dialogues(cfg):
        raise ValueError(
            f"experiment {cfg.name!r} trains on dialogues, which have no split {split!r} with "
            "answers to score: evaluate it with --benchmark"
        )
    if fresh_seed is None:
        return source(cfg.data.glyphs, cfg.data.seed, split, cfg.data.directory)
    return FreshSource(cfg.data.glyphs, fresh_seed, cfg.data.glyphs.size(split))


def loader_config(
    cfg: Experiment, batch: int, questions: int, seed: int, layout: Layout | None = None
) -> LoaderConfig:
    """The loader's settings; `batch` counts images over all processes.

    This process makes the rows that its devices hold under `layout`; without one, all.
    Raises ValueError for a batch that does not divide over the layout's devices.
    """
    return LoaderConfig(
        batch=batch, questions=questions, seed=seed,
        text_length=cfg.data.text_length, prefix_length=cfg.data.prefix_length,
        image_size=cfg.model.vision.image_size, patch=cfg.model.vision.patch_size,
        across=cfg.across,
        rows=None if layout is None else layout.rows(batch),
        max_bad_share=cfg.data.max_bad_share,
    )  # fmt: skip


def make_train_loader(
    cfg: Experiment,
    sources: Mapping[str, Source | DialogueSource],
    tokenizer: PreTrainedTokenizerFast,
    stage: TrainStage,
    index: int,
    layout: Layout | None = None,
) -> Loader | DialogueLoader:
    """Endless shuffled batches for one training stage; `sources` as `train_sources` gives them."""
    name = dataset_of(cfg, stage)
    data: Any = sources[name]
    if name:
        return dialogue_loader(cfg, data, tokenizer, stage, index, layout)
    glyphs = stage.glyphs or cfg.data.glyphs
    if stage.clutter:
        glyphs = replace(glyphs, clutter=stage.clutter)
    if glyphs != cfg.data.glyphs:
        data = FreshSource(glyphs, cfg.data.seed, glyphs.train)
    seed = cfg.train.seed * 1000 + index
    config = loader_config(cfg, stage.batch, stage.questions, seed, layout)
    template = TEMPLATES[cfg.data.template]
    return make_loader(data, tokenizer, template, config, True, glyphs)


def make_eval_loader(
    cfg: Experiment,
    data: Source,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout | None = None,
) -> Loader:
    """All questions in order, one a row, the image repeated; the last batch is padded."""
    config = loader_config(cfg, cfg.eval.batch, 1, 0, layout)
    config = replace(config, flat=True, shuffle=False)
    return make_loader(data, tokenizer, TEMPLATES[cfg.data.template], config, False)
