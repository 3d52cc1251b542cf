"""What the demo found, as JSON, as Markdown and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from focus_jax.charts import MethodPoint, accuracy_plot
from focus_jax.cli.demo_placement import points
from focus_jax.evaluate.operations import step_flops
from focus_jax.evaluate.runner import Result, Trained
from focus_jax.experiment import Experiment
from focus_jax.report import markdown_table
from focus_jax.study.statistics import Estimate, difference

SPLIT = "test"
REPORTED = (
    "accuracy", "low", "high", "n", "visual_slots_entering", "visual_slots_mean", "flops",
    "seconds_per_sample", "by_kind",
)  # fmt: skip
# Names of results.json: what is compared, with what.
PAIRS = {
    "focusllava": ("focusllava", "full"),
    "focusllava_to_random": ("focusllava", "random"),
    "random_trained": ("random_trained", "full"),
    "focusllava_to_random_trained": ("focusllava", "random_trained"),
}


@dataclass(frozen=True)
class Row:
    """One method's entry: the run whose weights it uses, and how it is asked for."""

    name: str
    run: str
    method: str


def right(path: Path) -> Bool[np.ndarray, "I Q"]:
    """Which answers of an evaluation's JSON lines are right, in the order of the split."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: (line["index"], line["question_number"]))
    images = len({line["index"] for line in lines})
    return np.array([line["correct"] for line in lines], bool).reshape(images, -1)


def paired(correct: dict[str, Bool[np.ndarray, "I Q"]]) -> dict[str, Estimate]:
    """The differences of `PAIRS` on the same questions, with their 95 % intervals."""
    return {name: difference(correct[a], correct[b]) for name, (a, b) in PAIRS.items()}


def summarise(
    configs: dict[str, Experiment],
    runs: dict[str, Trained],
    steps: dict[str, float | None],
    results: dict[Row, Result],
    pairs: dict[str, Estimate],
    placement: dict[str, Any],
    spent: float,
) -> dict[str, Any]:
    """What results.json holds."""
    flops = {
        name: step_flops(runs[name].config, configs[name].train.stages[-1], runs[name].method(None))
        for name in runs
    }
    values = {row.name: result.to_json() for row, result in results.items()}
    named = {"full": "full", "focusllava": "focus", "random_trained": "random"}
    return {
        "seconds": spent,
        "train_step_seconds": {name: steps[run] for name, run in named.items()},
        "train_step_flops_ratio": flops["focus"] / flops["full"],
        "methods": {name: {key: value[key] for key in REPORTED} for name, value in values.items()},
        "paired": {name: list(d) for name, d in pairs.items()},
        "placement": placement,
    }


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


def paired_table(pairs: dict[str, Estimate]) -> str:
    """One line for each difference, in percentage points."""
    lines = [{"what": " minus ".join(PAIRS[name]), "d": points(d)} for name, d in pairs.items()]
    return markdown_table(lines, [("what", "difference", ""), ("d", "points [95 %]", "")])


def kinds_table(results: dict[Row, Result]) -> str:
    """Accuracy of each method on each kind of question."""
    kinds = sorted(next(iter(results.values())).by_kind)
    lines = [
        {"name": row.name, **{k: result.by_kind[k]["accuracy"] for k in kinds}}
        for row, result in results.items()
    ]
    return markdown_table(lines, [("name", "method", ""), *((k, k, ".1%") for k in kinds)])


def page(
    workdir: Path,
    summary: dict[str, Any],
    results: dict[Row, Result],
    pairs: dict[str, Estimate],
    placement: str,
) -> str:
    """results.md: the tables, what they rest on, and how to make them again."""
    first = next(iter(results.values()))
    steps = {
        name: "not measured" if value is None else f"{value:.3f} s"
        for name, value in summary["train_step_seconds"].items()
    }
    return f"""# Visual-token compression on the embedded job

Exact match on {first.n} questions about {first.images} images of the {SPLIT} split, greedy, on
{first.device}. Slots are lengths of arrays; mean slots are over decoder layers. GFLOPs and ms are
of one question: prefill by the plan, prefill and decoding as measured.

{table(results)}
Weights `full` were trained with all visual tokens, `focus` with both samplers in place, `random`
with as many random patches as FocusLLaVA has mean slots; their last stages began from the same
parameters (`base`) and took equally many steps. The other methods of `full` are put on its weights
without further training.

A training step took {steps["full"]} with all tokens, {steps["random_trained"]} with random patches
and {steps["focusllava"]} with the samplers ({summary["train_step_flops_ratio"]:.0%} of the
operations of all tokens, by the plan). All of this took {summary["seconds"]:.0f} s.

Differences on the same questions, in percentage points; intervals count images, not questions:

{paired_table(pairs)}
![accuracy over slots](accuracy.png)
![what the samplers kept](samplers.png)

{placement}
## By kind of question

{kinds_table(results)}
## Again

```
python -m focus_jax demo --workdir {workdir}   # goes on where it stopped
{again(workdir, list(results))}
```
"""


def again(workdir: Path, rows: Sequence[Row]) -> str:
    """The commands that evaluate each row alone."""
    return "\n".join(
        f"python eval.py --checkpoint {workdir / row.run} --method {row.method} --split {SPLIT}"
        for row in rows
    )
