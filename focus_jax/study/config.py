"""The study as a value: what is trained on what, and at which budgets all of it is measured."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerFast

from focus_jax.compress.method import Method
from focus_jax.evaluate.budgets import behind_uniform, most, spending
from focus_jax.evaluate.runner import Trained
from focus_jax.experiment import Experiment, TrainStage
from focus_jax.methods import NAMES, parse_method
from focus_jax.models import params as names
from focus_jax.models.vlm import dims_of
from focus_jax.starting import check_model

Role = Literal["full", "ours", "budget", "plain", "gate", "router", "part", "cut", "other"]
ROLES: tuple[Role, ...] = Role.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Arm:
    """One training of the last stage with a method in place, all else equal.

    `method`: as on a command line, "" is FocusLLaVA as the base has it. `aligned`: the base's
    stages with samplers come before it, where they have something to train. `role`: `full` (one
    arm), `ours` (one: the method under study), `budget` (it at another budget), `plain` (baselines
    at its mean slots), `gate` (its router replaced by a control), `router` (by another learned
    one), `part` (`against` without one of its parts), `cut` (one text-guided cut), `other`.
    """

    name: str
    method: str = ""
    aligned: bool = True
    role: Role = "other"
    against: str = ""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\ |"):
            raise ValueError(f"arm {self.name!r}: its name is a folder's: no spaces, bars, slashes")
        if self.role not in ROLES:
            raise ValueError(f"arm {self.name!r}: role={self.role!r}: choose {', '.join(ROLES)}")


@dataclass(frozen=True)
class Study:
    """What all arms share, and what is measured.

    `base`: the stages before `joint`; those with samplers align the router. `joint`: what every
    arm runs, equal steps. `seeds` are of data and training alike. `layers`, `keeps`: where the
    weights trained with all tokens are cut, and how much stays. `gates`: control gates that are put
    on the weights of `ours`. `shares`: of full's slots, for the table of all `methods`.
    `validation`, `test`: images (0: all), of which `placed` are answered behind every cut.
    Prefill of `timed` questions is timed in `rounds`, for arms and for the methods at the share
    `timed_share` (0: arms alone).
    """

    base: Experiment
    joint: TrainStage
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1)
    layers: tuple[int, ...] = (0, 1, 2, 3)
    keeps: tuple[float, ...] = (0.25, 0.10, 0.05)
    shares: tuple[float, ...] = (0.39, 0.25, 0.10)
    methods: tuple[str, ...] = tuple(name for name in NAMES if name != "full")
    gates: tuple[str, ...] = ("measured", "random", "uniform", "oracle")
    validation: int = 0
    test: int = 0
    placed: int = 96
    batch: int = 16
    timed: int = 16
    timed_share: float = 0.25
    rounds: int = 21

    def __post_init__(self) -> None:
        known = [arm.name for arm in self.arms]
        for role in ("full", "ours"):
            count = sum(arm.role == role for arm in self.arms)
            if count != 1:
                raise ValueError(f"study: {count} arms have the role {role!r}: give it to one")
        if len(set(known)) < len(known):
            raise ValueError(f"study: arms {known} must have names of their own")
        for arm in self.arms:
            if arm.role == "part" and arm.against not in known:
                raise ValueError(f"study: arm {arm.name!r} stands against {arm.against!r}, no arm")
        if not self.seeds or not self.layers or not self.keeps:
            raise ValueError("study: give at least one seed, one layer and one keep")

    def arm(self, role: Role) -> Arm:
        """The arm of a role that one arm has."""
        return next(arm for arm in self.arms if arm.role == role)


def load_study(path: Path, size: str) -> Study:
    """What `get_study(size)` of a config program returns. FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: the study is a program in configs/ of the repository; run the "
            "command in a checkout that is installed with `pip install --editable .`"
        )
    sys.path.insert(0, str(path.parent))
    try:
        make: Callable[[str], Study] | None = runpy.run_path(str(path)).get("get_study")
    finally:
        sys.path.pop(0)
    if make is None:
        raise ValueError(f"{path} defines no get_study(size) that returns a Study")
    return make(size)


def base_of(study: Study, seed: int) -> Experiment:
    """The stages that all arms share, of one seed."""
    cfg = study.base
    stages = tuple(stage for stage in cfg.train.stages if not stage.samplers)
    return seeded(cfg, seed, f"{cfg.name}_{seed}", stages)


def arm_of(study: Study, arm: Arm, seed: int, start: str) -> Experiment:
    """An arm's own stages, which begin from the checkpoints `start`."""
    cfg = replace(study.base, compress=replace(study.base.compress, method=arm.method))
    aligning = tuple(stage for stage in cfg.train.stages if stage.samplers and arm.aligned)
    if not has_router(cfg):
        aligning = tuple(s for s in aligning if not all(map(names.is_sampler, s.train)))
    cfg = seeded(cfg, seed, f"{arm.name}_{seed}", (*aligning, study.joint))
    return replace(cfg, train=replace(cfg.train, init_from=start))


def seeded(cfg: Experiment, seed: int, name: str, stages: tuple[TrainStage, ...]) -> Experiment:
    """The experiment with its images, its order and its fresh weights from one seed."""
    train = replace(cfg.train, stages=stages, seed=seed)
    return replace(cfg, name=name, train=train, data=replace(cfg.data, seed=seed))


def method_of(base: Experiment, text: str) -> Method:
    """The method that `text` names; "" is the base's own."""
    return parse_method(text, base.compress) if text else base.compress.value()


def has_router(cfg: Experiment) -> bool:
    """Whether an experiment's method has parameters of its own."""
    shapes = names.abstract(cfg.model, cfg.compress.value())
    return any(map(names.is_sampler, names.named_leaves(shapes)))


# ------------------------------------------------------------------- for writing a study


def costs(base: Experiment) -> Trained:
    """A run without parameters, which plans and budgets ask what a method costs."""
    return Trained(Path(), base, PreTrainedTokenizerFast, {}, 0)  # type: ignore[arg-type]


def mean_share(base: Experiment, text: str = "") -> float:
    """What a method spends: mean slots over layers as a share of full's."""
    return costs(base).plan(method_of(base, text)).mean_share


def at_share(base: Experiment, name: str, share: float) -> str:
    """A method by name with the arguments that spend this share. ValueError: it cannot."""
    found = spending(costs(base), name, share)
    if not found.asked:
        raise ValueError(f"{name} cannot spend {share:.1%} of the slots: give another share")
    return found.asked


def behind_uniform_at(base: Experiment, name: str, share: float) -> str:
    """A method's cuts at their published shares behind uniform sampling, as `at_share`."""
    words = behind_uniform(dims_of(base.model, base.tiles))[name]
    found = most(costs(base), words, share)
    if found is None:
        raise ValueError(f"{name} behind uniform sampling cannot spend {share:.1%} of the slots")
    return found[0]


def overridden(text: str, name: str, **changes: object) -> str:
    """A method's text with some arguments replaced: dots are written as double underscores.

    `text` "" stands for `name` without arguments.
    """
    word, _, rest = (text or name).partition(":")
    given = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    given |= {key.replace("__", "."): str(value) for key, value in changes.items()}
    return f"{word}:" + ",".join(f"{key}={value}" for key, value in given.items())


def check(study: Study) -> Study:
    """The study, if every arm's method can stand in its model; else ValueError naming the arm."""
    dims = dims_of(study.base.model, study.base.model.max_tiles)
    for arm in study.arms:
        try:
            method_of(study.base, arm.method).check(dims)
        except ValueError as error:
            raise ValueError(f"arm {arm.name!r}: {error}") from error
    if study.base.train.init_from:
        check_model(study.base.train.init_from, study.base.model, vocabulary=False)
    beyond = [layer for layer in study.layers if not 0 <= layer < dims.layers]
    if beyond:
        raise ValueError(f"study: layers {beyond} are outside the decoder's {dims.layers}")
    return study
