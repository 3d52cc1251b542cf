"""`python -m focus_jax compare`: every method on one checkpoint at equal mean tokens."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_jax.cli.arguments import Meter, Parser, argv_or, not_negative
from focus_jax.cli.common import friendly
from focus_jax.data.glyph_config import SPLITS
from focus_jax.evaluate.budgets import Spending, spenders, spending
from focus_jax.evaluate.runner import Result, Trained, read_run
from focus_jax.evaluate.study import evaluate_once, write_json
from focus_jax.report import markdown_table
from focus_jax.workdir import write_text


@dataclass(frozen=True)
class Line:
    """One method at one share: on which run, and what came of it (None: it cannot spend so little).

    `trained`: the run learned with these samplers in place.
    """

    share: float
    spending: Spending
    run: Trained
    trained: bool
    result: Result | None


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, write results.md and results.json. Exit 0 with the tables on stdout."""
    flags = parser().parse_args(argv_or(argv))
    out: Path = flags.out
    runs = [(read_run(flags.checkpoint), False)]
    runs += [(read_run(path), True) for path in flags.trained]
    lines: list[Line] = []
    for share in flags.shares:
        for run, trained in runs:
            for one in asked_for(run, trained, flags.methods, share):
                lines.append(measure(one, run, trained, share, flags))
    whole = measure(Spending("full", "full", 1.0), runs[0][0], False, 1.0, flags)
    write_json(out / "results.json", [to_json(line) for line in (whole, *lines)])
    text = page(whole, lines, flags)
    write_text(out / "results.md", text)
    print(text, end="")
    return 0


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax compare",
        description="Score every method on one full-token checkpoint at equal mean visual slots "
        "over the decoder's layers. What is finished is not repeated.",
    )
    out.add_argument(
        "--checkpoint", type=Path, required=True, metavar="WORKDIR", help="trained with all tokens"
    )
    out.add_argument(
        "--trained", type=Path, action="append", default=[], metavar="WORKDIR",
        help="a run trained with samplers: its own method joins the table",
    )  # fmt: skip
    out.add_argument("--methods", type=names, default=(), metavar="M[,M]", help="default: all")
    out.add_argument(
        "--shares", type=shares, default=(0.39, 0.25, 0.1), metavar="S[,S]", help="of full's slots"
    )
    out.add_argument("--split", choices=SPLITS, default="test")
    out.add_argument("--limit", type=not_negative, default=0, metavar="N", help="images, 0: all")
    out.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR")
    out.add_argument(
        "--workdir", type=Path, default=Path("runs/compare"), metavar="DIR",
        help="finished evaluations, with every answer",
    )  # fmt: skip
    return out


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def shares(text: str) -> tuple[float, ...]:
    """`0.39,0.1` as numbers in (0, 1]."""
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: give shares in (0, 1]")
    return values


def asked_for(run: Trained, trained: bool, chosen: tuple[str, ...], share: float) -> list[Spending]:
    """What each method is asked for; of a run that was trained with samplers, its own alone."""
    own = (run.method(None).name,)
    every = own if trained else chosen or tuple(spenders(run))
    return [spending(run, name, share) for name in every]


def measure(one: Spending, run: Trained, trained: bool, share: float, flags: Any) -> Line:
    """One line of the table."""
    if not one.asked:
        return Line(share, one, run, trained, None)
    mark = "trained" if trained else "full"
    path = flags.workdir / mark / f"{one.name}_{share:g}.json"
    label = f"{one.asked} ({mark})"
    result = evaluate_once(
        path, run, one.asked, flags.split, flags.limit, progress=Meter(label),
        init_samplers="random" if one.name == "full" else "",
    )  # fmt: skip
    return Line(share, one, run, trained, result)


def to_json(line: Line) -> dict[str, Any]:
    """What results.json holds of a line."""
    result = line.result.to_json() if line.result else None
    return {
        "share": line.share, "method": line.spending.name, "asked": line.spending.asked,
        "least_share": line.spending.share, "trained": line.trained, "result": result,
    }  # fmt: skip


def cells(line: Line) -> dict[str, Any]:
    """A row of the table."""
    result, row = line.result, {"name": line.spending.name, "asked": f"`{line.spending.asked}`"}
    row["trained"] = "yes" if line.trained else "no"
    if result is None:
        least = f"spends {line.spending.share:.1%} at least" if line.spending.share else "cannot"
        return (
            row | dict.fromkeys(("slots", "accuracy", "interval", "flops"), "") | {"asked": least}
        )
    return row | {
        "slots": f"{result.visual_slots_mean:.1f} ({result.share_of_full:.1%})",
        "accuracy": f"{result.accuracy:.1%}",
        "interval": f"{result.low:.1%} to {result.high:.1%}",
        "flops": f"{result.flops / 1e9:.3f}",
    }


def table(lines: Sequence[Line]) -> str:
    """Best first; what cannot spend so little stands last."""
    order = sorted(lines, key=lambda line: -line.result.accuracy if line.result else 1.0)
    return markdown_table(
        [cells(line) for line in order],
        [
            ("name", "method", ""),
            ("trained", "trained with", ""),
            ("accuracy", "accuracy", ""),
            ("interval", "95 % interval", ""),
            ("slots", "mean slots", ""),
            ("flops", "GFLOPs", ""),
            ("asked", "--method", ""),
        ],
    )


def page(whole: Line, lines: Sequence[Line], flags: Any) -> str:
    """results.md: a table for each share."""
    assert whole.result is not None
    result, layers = whole.result, whole.run.config.model.decoder.layers
    parts = [
        f"""# All methods at equal mean tokens, embedded job

Exact match on {result.n} questions, {result.images} images of the {result.split} split, greedy.
Slots are lengths of arrays, in the mean over the decoder's layers, as a share of all tokens; each
method spends as many as it can without going over. GFLOPs are of one question's prefill, by the
plan. "Trained with": the weights were trained with the method in place; all others are put on the
full-token checkpoint as they come. With all tokens: **{result.accuracy:.1%}**
({result.low:.1%} to {result.high:.1%}), {result.flops / 1e9:.3f} GFLOPs.

The decoder has {layers} layers, and those before a cut hold all tokens: a method that cuts inside
it and cannot spend so little by itself stands behind uniform sampling (see its `--method`). The
images hold few things on much empty ground, one glyph a patch.
"""
    ]
    for share in dict.fromkeys(line.share for line in lines):
        chosen = [line for line in lines if line.share == share]
        parts.append(f"\n## {share:.0%} of the tokens\n\n{table(chosen)}")
    trained = " ".join(f"--trained {path}" for path in flags.trained)
    parts.append(
        f"\n## Again\n\n```\npython -m focus_jax demo --workdir runs/demo\n"
        f"python -m focus_jax compare --checkpoint {flags.checkpoint} {trained}".rstrip()
        + "\n```\n"
    )
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
