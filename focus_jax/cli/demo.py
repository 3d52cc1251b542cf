"""`python -m focus_jax demo`: FocusLLaVA against full tokens and baselines on the embedded job."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from focus_jax.charts import MethodPoint, accuracy_plot
from focus_jax.cli.arguments import Meter, Parser, argv_or, not_negative
from focus_jax.cli.common import friendly, split_flags
from focus_jax.cli.show import draw
from focus_jax.evaluate.operations import step_flops
from focus_jax.evaluate.runner import Result, Trained, read_run
from focus_jax.evaluate.study import evaluate_once, train_once, write_json
from focus_jax.experiment import Experiment, load_program, override
from focus_jax.report import markdown_table
from focus_jax.workdir import write_text

CONFIGS = Path(__file__).parents[2] / "configs"
SPLIT = "test"
IMAGE, QUESTIONS = 0, (0, 1)  # of the picture
CLOSE = 0.02  # of full's slots: how near random and uniform must come to FocusLLaVA's
REPORTED = (
    "accuracy", "low", "high", "n", "visual_slots_entering", "visual_slots_mean", "flops",
    "seconds_per_sample", "by_kind",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method's entry: the run whose weights it uses, and how it is asked for."""

    name: str
    run: str
    method: str


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, compare. Exit 0 with the table on stdout."""
    flags, settings = split_flags(parser(), argv_or(argv))
    workdir: Path = flags.workdir
    configs = experiments(workdir, settings)
    workdir.mkdir(parents=True, exist_ok=True)
    with clock(workdir):
        steps = {name: train_once(configs[name], workdir / name) for name in configs}
    with clock(workdir):
        runs = {name: read_run(workdir / name) for name in ("full", "focus")}
    results = {}
    for row in rows(runs):
        with clock(workdir):
            results[row] = evaluate_once(
                workdir / "evaluations" / f"{row.name}.json", runs[row.run], row.method, SPLIT,
                flags.limit, progress=Meter(row.name),
            )  # fmt: skip
    with clock(workdir):
        draw(runs["focus"], None, SPLIT, IMAGE, QUESTIONS, workdir / "samplers.png")
        plot(workdir / "accuracy.png", results)
    summary = summarise(configs, runs, steps, results, seconds(workdir))
    write_json(workdir / "results.json", summary)
    write_text(workdir / "results.md", page(workdir, summary, results))
    print(table(results), end="")
    return 0


def parser() -> Parser:
    """The demo's own flags; all others set fields of its three experiments."""
    out = Parser(
        "python -m focus_jax demo",
        description="Train the embedded job with all visual tokens and with FocusLLaVA's samplers, "
        "then score both beside simple baselines. What is finished is not repeated.",
        epilog="Other flags set fields of all three experiments, such as --data.seed 1.",
    )
    out.add_argument("--workdir", type=Path, required=True, help="e.g. runs/demo; resumes")
    out.add_argument(
        "--limit", type=not_negative, default=0, metavar="N", help="test images; 0: all"
    )
    return out


# ---------------------------------------------------------------------------- training


def experiments(workdir: Path, settings: Sequence[str] = ()) -> dict[str, Experiment]:
    """The base, and two last stages that begin from its parameters, in the order of training."""
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
    return {name: override(cfg, settings, "focus_jax demo") for name, cfg in out.items()}


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


def rows(runs: dict[str, Trained]) -> list[Row]:
    """The methods; baselines spend as many slots, in the mean over layers, as FocusLLaVA."""
    cost = runs["focus"].plan(runs["focus"].method("focusllava"))
    size = max(1, round(cost.mean_slots**0.5))
    keep = round(cost.mean_share, 4)
    baselines = {
        "pool": f"pool:size={size}", "downsample": f"downsample:size={size}",
        "uniform": f"uniform:keep={keep}", "random": f"random:keep={keep}",
    }  # fmt: skip
    for name in ("uniform", "random"):
        share = runs["full"].plan(runs["full"].method(baselines[name])).mean_share
        if abs(share - cost.mean_share) > CLOSE:
            raise ValueError(
                f"{name} spends {share:.1%} of the slots, FocusLLaVA {cost.mean_share:.1%}: no "
                "fair comparison; choose a budget and a keep that fewer patches can match"
            )
    of_full = [Row("full", "full", "full")]
    of_full += [Row(name, "full", method) for name, method in baselines.items()]
    halves = ("focusllava", "vision_only", "text_only")
    return of_full + [Row(name, "focus", name) for name in halves]


def summarise(
    configs: dict[str, Experiment],
    runs: dict[str, Trained],
    steps: dict[str, float | None],
    results: dict[Row, Result],
    spent: float,
) -> dict[str, Any]:
    """What results.json holds."""
    flops = {
        name: step_flops(runs[name].config, configs[name].train.stages[-1], runs[name].method(None))
        for name in runs
    }
    values = {row.name: result.to_json() for row, result in results.items()}
    return {
        "seconds": spent,
        "train_step_seconds": {"full": steps["full"], "focusllava": steps["focus"]},
        "train_step_flops_ratio": flops["focus"] / flops["full"],
        "methods": {name: {key: value[key] for key in REPORTED} for name, value in values.items()},
    }


# ------------------------------------------------------------------------------ report


def plot(path: Path, results: dict[Row, Result]) -> None:
    """Accuracy over the share of visual slots."""
    accuracy_plot(
        path,
        [
            MethodPoint(row.name, r.share_of_full, r.accuracy, r.low, r.high)
            for row, r in results.items()
        ],
    )


def table(results: dict[Row, Result]) -> str:
    """One line for each method."""
    lines = []
    for row, result in results.items():
        lines.append(
            {
                **result.to_json(), "name": row.name, "run": row.run, "asked": row.method,
                "interval": f"{result.low:.1%} to {result.high:.1%}",
            }
        )  # fmt: skip
    return markdown_table(
        lines,
        [
            ("name", "method", ""),
            ("run", "weights", ""),
            ("asked", "--method", ""),
            ("accuracy", "accuracy", ".1%"),
            ("interval", "95 % interval", ""),
            ("visual_slots_entering", "slots entering", "d"),
            ("visual_slots_mean", "mean slots", ".1f"),
            ("share_of_full", "of full", ".1%"),
            ("flops", "GFLOPs", lambda n: f"{n / 1e9:.3f}"),
            ("seconds_per_sample", "ms", lambda s: f"{s * 1e3:.2f}"),
        ],
    )


def kinds_table(results: dict[Row, Result]) -> str:
    """Accuracy of each method on each kind of question."""
    kinds = sorted(next(iter(results.values())).by_kind)
    lines = [
        {"name": row.name, **{k: result.by_kind[k]["accuracy"] for k in kinds}}
        for row, result in results.items()
    ]
    return markdown_table(lines, [("name", "method", ""), *((k, k, ".1%") for k in kinds)])


def page(workdir: Path, summary: dict[str, Any], results: dict[Row, Result]) -> str:
    """results.md: the tables, what they rest on, and how to make them again."""
    first = next(iter(results.values()))
    steps = {
        name: "not measured" if value is None else f"{value:.3f} s"
        for name, value in summary["train_step_seconds"].items()
    }
    again = "\n".join(
        f"python eval.py --checkpoint {workdir / row.run} --method {row.method} --split {SPLIT}"
        for row in results
    )
    return f"""# Visual-token compression on the embedded job

Exact match on {first.n} questions about {first.images} images of the {SPLIT} split, greedy, on
{first.device}. Slots are lengths of arrays; mean slots are over decoder layers. GFLOPs and ms are
of one question: prefill by the plan, prefill and decoding as measured.

{table(results)}
Weights `full` were trained with all visual tokens, `focus` with both samplers in place; both last
stages began from the same parameters (`base`) and took equally many steps. The methods of `full`
are put on its weights without further training.

A training step took {steps["full"]} with all tokens and {steps["focusllava"]} with the samplers
({summary["train_step_flops_ratio"]:.0%} of the operations, by the plan). All of this took
{summary["seconds"]:.0f} s.

![accuracy over slots](accuracy.png)
![what the samplers kept](samplers.png)

## By kind of question

{kinds_table(results)}
## Again

```
python -m focus_jax demo --workdir {workdir}   # goes on where it stopped
{again}
```
"""


if __name__ == "__main__":
    sys.exit(main())
