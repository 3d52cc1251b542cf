"""Runs on dialogues: their data sets, tokenizer, and how photos become tiles."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerFast

from focus_jax.compress.baselines import full
from focus_jax.compress.method import Method
from focus_jax.config import ModelConfig
from focus_jax.data.built import open_built
from focus_jax.data.conversation import TEMPLATES
from focus_jax.data.dialogue import DialogueSource
from focus_jax.data.dialogue_loader import DialogueLoader, make_dialogue_loader
from focus_jax.data.dialogue_plan import Shape
from focus_jax.data.loader_config import DialogueConfig
from focus_jax.data.preprocess import ImageConfig
from focus_jax.data.tokenizer import read_tokenizer
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.models.vlm import dims_of
from focus_jax.sharding import Layout
from focus_jax.starting import parts_of

# Threads that make batches; each batch in flight holds its pixels in memory.
_THREADS = 16


def dataset_of(cfg: Experiment, stage: TrainStage) -> str:
    """The folder of a stage's dialogues; "" is the embedded set."""
    return stage.dataset or cfg.data.dataset


def has_dialogues(cfg: Experiment) -> bool:
    """Whether an experiment trains on dialogues."""
    return bool(cfg.data.dataset) or any(stage.dataset for stage in cfg.train.stages)


def check_stages(cfg: Experiment) -> None:
    """ValueError for a stage that cannot be trained on dialogues."""
    for stage in cfg.train.stages:
        name = f"stage {stage.name!r}"
        if not dataset_of(cfg, stage):
            raise ValueError(
                f"{name} has no data set, though others train on dialogues: set its dataset or "
                "data.dataset"
            )
        if stage.objective != "answers" or stage.clutter:
            raise ValueError(
                f"{name}: objective {stage.objective!r} and clutter={stage.clutter} are for the "
                "embedded set: dialogues train with objective 'answers' and without clutter"
            )
        if stage.questions != 1:
            raise ValueError(
                f"{name}: questions={stage.questions}, but a dialogue is one text: set questions=1"
            )


def open_datasets(cfg: Experiment) -> dict[str, DialogueSource]:
    """The data sets of all stages by their folders. FileNotFoundError where one is missing."""
    return {name: open_built(name) for name in {dataset_of(cfg, s) for s in cfg.train.stages}}


def tokenizer_of(cfg: Experiment) -> PreTrainedTokenizerFast:
    """The tokenizer of `data.tokenizer`, or of what training starts from.

    ValueError where neither is given, or the model's vocabulary is too small.
    """
    start = cfg.train.init_from
    if not cfg.data.tokenizer and not start:
        raise ValueError(
            "training on dialogues needs a tokenizer: set data.tokenizer to a directory that has "
            "one, or train.init_from to a checkpoint"
        )
    parts = None if cfg.data.tokenizer else parts_of(start)
    folder = Path(cfg.data.tokenizer or (parts.decoder if parts else start)).expanduser()
    # A run keeps its own beside its checkpoints; one of these may be named as well.
    places = (folder, *(up / "tokenizer" for up in (folder, *folder.parents[:2])))
    found = next((place for place in places if (place / "tokenizer.json").is_file()), folder)
    tokenizer = read_tokenizer(found)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer in {found} gives no character offsets, of which masks are made: give a "
            "directory with tokenizer.json"
        )
    check_vocabulary(cfg, tokenizer)
    return tokenizer


def check_vocabulary(cfg: Experiment, tokenizer: PreTrainedTokenizerFast) -> None:
    """ValueError where a tokenizer has more tokens than the model."""
    size = cfg.model.decoder.vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {size}: set "
            f"--model.decoder.vocab-size to that of the checkpoint, {len(tokenizer)} at least"
        )


def image_config(cfg: Experiment) -> ImageConfig:
    """How a run's photos become tiles: `data.photos` with the model's sizes, as LLaVA's code does.

    ValueError for tiles of a model that takes one view.
    """
    model, several = cfg.model, cfg.model.max_tiles > 1
    layout = cfg.data.photos or ("anyres" if several else "pad")
    if layout == "anyres" and not several:
        raise ValueError(
            "data.photos='anyres' cuts a photo into tiles, and model.max_tiles=1 takes one view: "
            "raise it, or choose 'pad'"
        )
    size = model.vision.image_size
    red, green, blue = (int(mean * 255) for mean in model.vision.pixel_mean)
    grids = fitting_grids(model) if layout == "anyres" else ()
    return ImageConfig(
        layout=layout,
        size=size,
        patch=model.vision.patch_size,
        pinpoints=tuple((cols * size, rows * size) for rows, cols in grids),
        background=(red, green, blue),
    )


def fitting_grids(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The grids of tiles that a model has room for, thumbnail included."""
    return tuple(grid for grid in model.grids if grid[0] * grid[1] < model.max_tiles)


def dialogue_loader(
    cfg: Experiment,
    data: DialogueSource,
    tokenizer: PreTrainedTokenizerFast,
    stage: TrainStage,
    index: int,
    layout: Layout | None = None,
) -> DialogueLoader:
    """Endless shuffled batches of dialogues for one training stage; tells their shapes on stderr.

    ValueError for dialogues that exceed the decoder's context.
    """
    name = stage.template or cfg.data.template
    template = next(one for one in TEMPLATES if one.name == name)
    threads = min(os.cpu_count() or 1, _THREADS)
    config = DialogueConfig(
        batch=stage.batch, accumulate=stage.accumulate, lengths=cfg.data.lengths,
        seed=cfg.train.seed * 1000 + index, max_bad_share=cfg.data.max_bad_share,
        rows=None if layout is None else layout.rows(stage.batch),
        threads=threads, prefetch=threads + 2,
    )  # fmt: skip
    folder = Path(dataset_of(cfg, stage))
    loader = make_dialogue_loader(data, tokenizer, template, config, image_config(cfg), folder)
    method = cfg.compress.value() if stage.samplers else full()
    for shape in loader.longest():
        check_context(cfg.model, method, shape)
    if jax.process_index() == 0:
        print(f"stage {stage.name!r}: {loader.about()}", file=sys.stderr, flush=True)
    return loader


def check_context(model: ModelConfig, method: Method, shape: Shape) -> None:
    """ValueError for a row that may be longer than what the decoder has positions for."""
    dims = dims_of(model, max(shape.tiles, 1))
    visual = method.stage_slots(dims, train=True, images=shape.images)[0]
    limit = model.decoder.max_position
    if visual + shape.text > limit:
        raise ValueError(
            f"dialogues of {shape.images} images with up to {shape.tiles} views have {shape.text} "
            f"tokens of text and up to {visual} visual ones, more than the decoder's context of "
            f"{limit}: lower the last of data.lengths (longer text is cut), use a method that lets "
            "fewer visual tokens in, or leave rows of many images out of the data set"
        )


def with_vocabulary(cfg: Experiment, size: int) -> Experiment:
    """The experiment with a vocabulary of so many tokens."""
    decoder = replace(cfg.model.decoder, vocab_size=size)
    return replace(cfg, model=replace(cfg.model, decoder=decoder))
