"""`eval.py`: a checkpoint's score with any method, as a Markdown table, JSON and answers.

On the embedded set for runs of it; with --benchmark on the field's (evaluate_benchmarks.py).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from focus_jax.cli import evaluate_benchmarks
from focus_jax.cli.arguments import Meter, Parser, argv_or, not_negative, positive
from focus_jax.cli.common import add_process_flags, friendly, joined
from focus_jax.data.glyph_config import SPLITS
from focus_jax.evaluate.runner import Result, evaluate, read_run
from focus_jax.evaluate.study import write_json
from focus_jax.report import markdown_table
from focus_jax.sharding import make_layout


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a run. Exit 0 when all questions were answered."""
    flags = parser().parse_args(argv_or(argv))
    evaluate_benchmarks.check_flags(flags)
    with joined(flags, preemptible=False):
        (evaluate_benchmarks.score if flags.benchmark else score)(flags)
    return 0


def score(flags: argparse.Namespace) -> None:
    """Answer, and let process 0 tell and write."""
    tells = jax.process_index() == 0
    run = read_run(flags.checkpoint, make_layout(flags.mesh))
    result = evaluate(
        run, flags.method, flags.split, flags.data_seed, flags.limit, flags.batch, flags.answers,
        flags.init_samplers, Meter("evaluate") if tells else None,
    )  # fmt: skip
    if tells and flags.json:
        write_json(flags.json, result.to_json())
    if tells:
        print(table(result), end="")


def parser() -> Parser:
    """The flags of `eval.py`."""
    out = Parser("eval.py", description="Score a checkpoint with any compression method.")
    out.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="a run of train.py; with --benchmark also a LLaVA checkpoint, or its name on the hub",
    )  # fmt: skip
    out.add_argument("--method", metavar="M", help="e.g. random:keep=0.25; default: its own")
    out.add_argument("--split", choices=SPLITS, help="default: the run's eval.split")
    out.add_argument("--data-seed", type=not_negative, metavar="N", help="images made anew")
    out.add_argument(
        "--limit", type=not_negative, default=0, metavar="N",
        help="the first images (embedded set) or questions, 0: all",
    )  # fmt: skip
    out.add_argument("--batch", type=positive, default=0, metavar="N", help="questions at a time")
    out.add_argument(
        "--mesh", default="data", metavar="M",
        help="how devices stand, such as fsdp,tensor=2; default: data, each with the whole model",
    )  # fmt: skip
    out.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    out.add_argument("--answers", type=Path, metavar="FILE", help="write every answer, JSON lines")
    out.add_argument(
        "--init-samplers", choices=("random",), default="",
        help="fresh weights where a learned method has none in the checkpoint",
    )  # fmt: skip
    evaluate_benchmarks.add_flags(out)
    add_process_flags(out)
    return out


def table(result: Result) -> str:
    """Accuracy in all and by kind with intervals, then what an answer costs."""
    everything = {"accuracy": result.accuracy, "low": result.low, "high": result.high}
    scores = {"all": {**everything, "n": result.n}} | result.by_kind
    rows = [
        {"kind": kind, **score, "interval": f"{score['low']:.1%} to {score['high']:.1%}"}
        for kind, score in scores.items()
    ]
    head = f"{result.method} on {result.split}, {result.checkpoint} at step {result.step}\n\n"
    accuracy = markdown_table(
        rows,
        [
            ("kind", "questions", ""),
            ("accuracy", "accuracy", ".1%"),
            ("interval", "95 % interval", ""),
            ("n", "n", ".0f"),
        ],
    )
    return head + accuracy + "\n" + costs(result)


def costs(result: Result) -> str:
    """Slots, operations and time of one answer."""
    share = f"{result.share_of_full:.1%}"
    row = {**result.to_json(), "slots": f"{result.visual_slots_mean:.1f} ({share} of full)"}
    return markdown_table(
        [row],
        [
            ("visual_slots_entering", "visual slots entering", "d"),
            ("slots", "mean over layers", ""),
            ("flops", "GFLOPs a question", lambda n: f"{n / 1e9:.3f}"),
            ("seconds_per_sample", "seconds a question", ".5f"),
            ("unreadable", "unreadable", "d"),
            ("device", "device", ""),
        ],
    )
