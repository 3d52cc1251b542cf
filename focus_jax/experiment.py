"""One experiment as a value: model, compression, data, training, evaluation; flags; JSON."""

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import TypeAdapter, ValidationError

from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.method import Method
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.config import LoraConfig, ModelConfig, tiny
from focus_jax.data.cells import views
from focus_jax.data.glyph_config import GlyphsConfig
from focus_jax.objectives import ObjectiveName
from focus_jax.sharding import ShardingRules


@dataclass(frozen=True)
class VisionSampler(VisionGuided):
    """`VisionGuided` with a switch."""

    enabled: bool = True


@dataclass(frozen=True)
class TextSampler(TextGuided):
    """`TextGuided` with a switch."""

    enabled: bool = True


@dataclass(frozen=True)
class CompressConfig:
    """FocusLLaVA's samplers as flat flags; a `Method` is built from it.

    `method`: another method by its name on a command line, such as `prumerge:ratio=0.125`.
    """

    vision: VisionSampler = field(default_factory=VisionSampler)
    text: TextSampler = field(default_factory=lambda: TextSampler(layer=16))
    method: str = ""

    def value(self) -> Method:
        """The named method; otherwise both samplers, one, or neither (full tokens)."""
        if self.method:
            from focus_jax.methods import parse_method  # it reads samplers from here

            return parse_method(self.method, self)
        vision = VisionGuided(**parent_fields(self.vision, VisionGuided))
        text = TextGuided(**parent_fields(self.text, TextGuided))
        return focusllava(
            vision if self.vision.enabled else None, text if self.text.enabled else None
        )


def usual_samplers(model: ModelConfig) -> CompressConfig:
    """FocusLLaVA's samplers in the paper's proportions: the text-guided one in the middle."""
    # 225 tokens for the 24x24 patches of a tile: the same share of smaller ones.
    budget = round(VisionGuided().budget * model.vision.patches / 24**2)
    text = TextSampler(layer=model.decoder.layers // 2)
    return CompressConfig(vision=VisionSampler(budget=budget), text=text)


def parent_fields(value: Any, parent: type) -> dict[str, Any]:
    """The fields that `value` has from a parent dataclass."""
    return {f.name: getattr(value, f.name) for f in fields(parent)}


TemplateName = Literal["bare", "brief", "vicuna_v1", "llama3", "mistral", "chatml", "plain"]


@dataclass(frozen=True)
class DataConfig:
    """The embedded data set, or one of dialogues, and how its text becomes tokens.

    `text_length`, `prefix_length`: tokens behind and before the image, padded to (embedded set).
    `dataset`: a folder that `python -m focus_jax data build` made; "" is the embedded set.
    `lengths`: sizes that a dialogue's text is padded to; what is longer than the last is cut.
    `tokenizer`: its directory; "" is that of `train.init_from`. `photos`: how photos become tiles
    (see `preprocess.ImageConfig`); "" is `anyres` for models of several tiles, else `pad`.
    """

    dataset: str = ""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    tokenizer: str = ""
    photos: Literal["", "squash", "pad", "crop", "anyres"] = ""
    glyphs: GlyphsConfig = field(default_factory=GlyphsConfig)
    seed: int = 0
    directory: str = "runs/data"
    template: TemplateName = "bare"
    text_length: int = 11
    prefix_length: int = 2
    max_bad_share: float = 0.01


@dataclass(frozen=True)
class TrainStage:
    """One stage of training.

    `objective`: `answers` (the real one), `words` (the decoder alone, scenes told in words), `fit`
    (the projector in closed form from `steps` batches; see alignment.py), `describe` (the same by
    gradients, tower included), `route` (the vision stage's own losses).
    `train`: prefixes of the canonical parameter names that learn; the rest is frozen. With
    `model.lora`, `decoder.layers.lora.` stands for the updates; kernels that have one stay frozen.
    `scale`: (prefix, factor) pairs on the learning rate. `samplers`: whether the method is in
    place (otherwise all visual tokens). Schedule: linear warm-up over a share of the steps, cosine
    down to `final` of the peak. `muon`: peak learning rate of the decoder's stacked kernels under
    Muon (Jordan et al., 2024; small decoders learn to look things up in half the steps), all else
    then under AdamW with Nesterov momentum; 0: AdamW for all. `accumulate`: batches a step.
    `clutter`: images made on the fly with that share of their cells filled (objective `fit`).
    `glyphs`: scenes of this stage alone, made on the fly, of the same words (a curriculum).
    `dataset`, `template`: this stage's own in place of those of `data`.
    """

    name: str
    objective: ObjectiveName | Literal["fit"]
    steps: int
    learning_rate: float
    train: tuple[str, ...] = ("",)
    scale: tuple[tuple[str, float], ...] = ()
    samplers: bool = True
    batch: int = 32
    questions: int = 4
    accumulate: int = 1
    warmup: float = 0.03
    final: float = 0.05
    clip: float = 1.0
    muon: float = 0.0
    clutter: float = 0.0
    glyphs: GlyphsConfig | None = None
    dataset: str = ""
    template: Literal[TemplateName, ""] = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "questions", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage {self.name!r}: {name}={getattr(self, name)}: give >= 1")


@dataclass(frozen=True)
class TrainConfig:
    """All stages, in order, as one run. AdamW; `save_every` counts steps.

    `init_from`: what training starts from (see starting.py); "" is fresh parameters.
    `devices` (0: all) stand in a `mesh`: `data` (plain data parallelism), `fsdp`, `fsdp,tensor=2`
    or sizes for all axes; `rules` say which axes of arrays are split over which of it.
    """

    stages: tuple[TrainStage, ...] = ()
    seed: int = 0
    init_from: str = ""
    init_samplers: Literal["", "random"] = "random"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    devices: int = 0
    mesh: str = "data"
    rules: ShardingRules = field(default_factory=ShardingRules)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class EvalConfig:
    """Greedy answers on a split; `limit` images (0: all)."""

    split: Literal["validation", "test"] = "validation"
    batch: int = 64
    max_new_tokens: int = 4
    limit: int = 0


@dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on."""

    name: str
    model: ModelConfig = field(default_factory=tiny)
    compress: CompressConfig = field(default_factory=CompressConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def across(self) -> int:
        """Views along a side of the embedded set's images: 1, or the side of a grid of tiles.

        1 as well where the model has no grid of that size, which the loader then tells.
        """
        across, rest = divmod(self.data.glyphs.image_size, self.model.vision.image_size)
        square = (across, across) in self.model.grids and across**2 < self.model.max_tiles
        return across if square and not rest else 1

    @property
    def tiles(self) -> int:
        """M: views of an image of the embedded set, the thumbnail included."""
        return views(self.across)


def to_json(config: Experiment) -> str:
    """The experiment as JSON text."""
    return TypeAdapter(Experiment).dump_json(config, indent=2).decode()


def from_json(text: str, where: str = "config") -> Experiment:
    """The experiment that `to_json` wrote; ValueError naming the field that does not fit."""
    try:
        config = TypeAdapter(Experiment).validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{where} does not describe an experiment: {error}") from error
    unknown = unknown_field(json.loads(text), json.loads(to_json(config)))
    if unknown:
        raise ValueError(f"{where} does not describe an experiment: there is no field {unknown}")
    return config


def unknown_field(given: Any, known: Any, name: str = "") -> str | None:
    """The first field of nested JSON objects that their counterpart does not have."""
    if isinstance(given, list) and isinstance(known, list):
        given, known = dict(enumerate(given)), dict(enumerate(known))
    if not isinstance(given, dict) or not isinstance(known, dict):
        return None
    for key, value in given.items():
        place = f"{name}.{key}" if name else str(key)
        found = unknown_field(value, known[key], place) if key in known else place
        if found:
            return found
    return None


def load_program(path: str | Path) -> Experiment:
    """The experiment that a config program's `get_config()` returns."""
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.py"))) or "nothing"
        raise FileNotFoundError(f"no config at {path}; its folder holds {near}")
    sys.path.insert(0, str(path.parent))
    try:
        namespace = runpy.run_path(str(path))
    finally:
        sys.path.pop(0)
    make: Callable[[], Experiment] | None = namespace.get("get_config")
    if make is None:
        raise ValueError(f"{path} defines no get_config() that returns an Experiment")
    return make()


def with_stages(config: Experiment, stages: Sequence[str]) -> Experiment:
    """The experiment with those of its training stages alone, in its own order.

    ValueError for a name that none has. What a stage starts from is `train.init_from`'s business.
    """
    names = [stage.name for stage in config.train.stages]
    for name in stages:
        if name not in names:
            raise ValueError(
                f"experiment {config.name!r} has no stage {name!r}: choose from {', '.join(names)}"
            )
    chosen = tuple(stage for stage in config.train.stages if stage.name in stages)
    return replace(config, train=replace(config.train, stages=chosen))


def with_lora(config: Experiment, lora: LoraConfig) -> Experiment:
    """The experiment with low-rank updates of the decoder's layers, in whose place they learn.

    Where a stage's `train` names `decoder.`, only the updates learn of the decoder, as in LLaVA's
    LoRA recipe (rank 128, alpha 256, learning rate 2e-4, projector a tenth of that).
    """

    def adapted(stage: TrainStage) -> TrainStage:
        own = tuple("decoder.layers.lora." if p == "decoder." else p for p in stage.train)
        return replace(stage, train=own)

    stages = tuple(adapted(stage) for stage in config.train.stages)
    return replace(
        config,
        model=replace(config.model, lora=lora),
        train=replace(config.train, stages=stages),
    )


def override(config: Experiment, flags: Sequence[str], prog: str) -> Experiment:
    """The experiment with fields set by flags (`--compress.text.layer 2`).

    An unknown or misspelt flag ends the program with a message that names the near ones.
    """
    return tyro.cli(
        tyro.conf.configure(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)(Experiment),
        default=config,
        args=list(flags),
        prog=prog,
    )
