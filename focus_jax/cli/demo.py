"""`python -m focus_jax demo`: FocusLLaVA against full tokens and baselines on the embedded job."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from focus_jax.cli.arguments import Meter, Parser, argv_or, not_negative
from focus_jax.cli.common import friendly, split_flags
from focus_jax.cli.demo_placement import figures, place_once, section
from focus_jax.cli.demo_report import SPLIT, Row, page, paired, plot, right, summarise, table
from focus_jax.cli.show import draw
from focus_jax.compress.text_guided import TextGuided
from focus_jax.evaluate.runner import Result, read_run
from focus_jax.evaluate.study import evaluate_once, train_once, write_json
from focus_jax.experiment import Experiment, load_program, override, parent_fields
from focus_jax.study.config import costs, method_of
from focus_jax.study.pictures import placement_panels
from focus_jax.study.statistics import share_right
from focus_jax.workdir import write_text

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGE, QUESTIONS = 0, (0, 1)  # of the picture
CLOSE = 0.02  # of full's slots: how near random and uniform must come to FocusLLaVA's


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, compare. Exit 0 with the table on stdout."""
    flags, settings = split_flags(parser(), argv_or(argv))
    if flags.limit == 1:
        raise ValueError("--limit 1: intervals count images and need two; give 0 or 2 and more")
    workdir: Path = flags.workdir
    configs = experiments(workdir, settings)
    workdir.mkdir(parents=True, exist_ok=True)
    with clock(workdir):
        steps = {name: train_once(configs[name], workdir / name) for name in configs}
    with clock(workdir):
        runs = {name: read_run(workdir / name) for name in ("full", "focus", "random")}
    results: dict[Row, Result] = {}
    for row in rows(runs["focus"].config):
        with clock(workdir):
            results[row] = evaluate_once(
                answers_of(workdir, row.name), runs[row.run], row.method, SPLIT, flags.limit,
                progress=Meter(row.name),
            )  # fmt: skip
    cut = TextGuided(**parent_fields(runs["focus"].config.compress.text, TextGuided))
    with clock(workdir):
        stored = answers_of(workdir, "placement")
        curves = place_once(stored, runs["full"], cut, SPLIT, flags.limit)
    correct = {row.name: right(answers_of(workdir, row.name, "jsonl")) for row in results}
    full = share_right(correct["full"][: len(curves[0].correct)])
    with clock(workdir):
        draw(runs["focus"], None, SPLIT, IMAGE, QUESTIONS, workdir / "samplers.png")
        plot(workdir / "accuracy.png", results)
        placement_panels(workdir / "placement.png", curves, full.value)
    pairs, placed = paired(correct), figures(curves, cut, full)
    summary = summarise(configs, runs, steps, results, pairs, placed, seconds(workdir))
    write_json(workdir / "results.json", summary)
    write_text(
        workdir / "results.md", page(workdir, summary, results, pairs, section(curves, placed))
    )
    print(table(results), end="")
    return 0


def answers_of(workdir: Path, name: str, ending: str = "json") -> Path:
    """Where an evaluation's result lies; `jsonl`: its single answers."""
    return workdir / "evaluations" / f"{name}.{ending}"


def parser() -> Parser:
    """The demo's own flags; all others set fields of its four experiments."""
    out = Parser(
        "python -m focus_jax demo",
        description="Train the embedded job with all visual tokens, with FocusLLaVA's samplers and "
        "with random patches, score them beside simple baselines, and cut the decoder at every "
        "layer. What is finished is not repeated.",
        epilog="Other flags set fields of all four experiments, such as --data.seed 1.",
    )
    out.add_argument("--workdir", type=Path, required=True, help="e.g. runs/demo; resumes")
    out.add_argument(
        "--limit", type=not_negative, default=0, metavar="N", help="test images; 0: all"
    )
    return out


# ---------------------------------------------------------------------------- training


def experiments(workdir: Path, settings: Sequence[str] = ()) -> dict[str, Experiment]:
    """The base, and three last stages that begin from its parameters, in the order of training.

    ValueError where no random patches are as many as FocusLLaVA's mean slots.
    """
    missing = [n for n in ("base", "full", "focus") if not (CONFIGS / f"glyphs_{n}.py").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{CONFIGS} has no glyphs_{missing[0]}.py: the demo trains the programs in configs/ of "
            "the repository; run it in a checkout that is installed with `pip install --editable .`"
        )
    out = {"base": load_program(CONFIGS / "glyphs_base.py")}
    for name in ("full", "focus"):
        cfg = load_program(CONFIGS / f"glyphs_{name}.py")
        start = str(workdir / "base" / "checkpoints")
        train = replace(cfg.train, stages=cfg.train.stages[-1:], init_from=start)
        out[name] = replace(cfg, train=train)
    out = {name: override(cfg, settings, "focus_jax demo") for name, cfg in out.items()}
    compress = replace(out["focus"].compress, method=baselines(out["focus"])["random"])
    return out | {"random": replace(out["focus"], name="glyphs_random", compress=compress)}


@contextmanager
def clock(workdir: Path) -> Iterator[None]:
    """Adds what its body takes to the seconds of all calls, also when it is interrupted."""
    start = time.perf_counter()
    try:
        yield
    finally:
        total = seconds(workdir) + time.perf_counter() - start
        write_json(workdir / "state.json", {"seconds": total})


def seconds(workdir: Path) -> float:
    """Seconds spent in this workdir so far."""
    path = workdir / "state.json"
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0


# -------------------------------------------------------------------------- evaluation


def baselines(focus: Experiment) -> dict[str, str]:
    """Methods that spend as many slots, in the mean over layers, as FocusLLaVA. Else ValueError."""
    run = costs(focus)
    cost = run.plan(method_of(focus, "focusllava"))
    size = max(1, round(cost.mean_slots**0.5))
    keep = round(cost.mean_share, 4)
    out = {
        "pool": f"pool:size={size}", "downsample": f"downsample:size={size}",
        "uniform": f"uniform:keep={keep}", "random": f"random:keep={keep}",
    }  # fmt: skip
    for name in ("uniform", "random"):
        share = run.plan(method_of(focus, out[name])).mean_share
        if abs(share - cost.mean_share) > CLOSE:
            raise ValueError(
                f"{name} spends {share:.1%} of the slots, FocusLLaVA {cost.mean_share:.1%}: no "
                "fair comparison; choose a budget and a keep that fewer patches can match"
            )
    return out


def rows(focus: Experiment) -> list[Row]:
    """The methods, and the weights each is put on; `random_trained` was trained with its own."""
    others = baselines(focus)
    of_full = [Row("full", "full", "full")]
    of_full += [Row(name, "full", method) for name, method in others.items()]
    trained = Row("random_trained", "random", others["random"])
    halves = ("focusllava", "vision_only", "text_only")
    return [*of_full, trained, *(Row(name, "focus", name) for name in halves)]


if __name__ == "__main__":
    sys.exit(main())
