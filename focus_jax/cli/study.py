"""`python -m focus_jax study`: what each part of FocusLLaVA brings, beside its controls."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from focus_jax.cli.arguments import Parser, argv_or, positive
from focus_jax.cli.common import friendly, split_flags
from focus_jax.compilation import keep_compiled
from focus_jax.evaluate.study import write_json
from focus_jax.experiment import override
from focus_jax.study.claims import claims
from focus_jax.study.comparisons import loss_of
from focus_jax.study.config import Study, check, load_study
from focus_jax.study.page import page, summary
from focus_jax.study.pictures import draw
from focus_jax.study.results import Results, Row
from focus_jax.study.run import PARTS, Part, run_seed, run_study
from focus_jax.study.statistics import share_right
from focus_jax.study.verdicts import Claim
from focus_jax.workdir import write_text

PROGRAM = Path(__file__).parents[2] / "configs" / "study.py"


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, judge. Exit 0 with the verdicts on stdout."""
    given = argv_or(argv)
    flags, settings = split_flags(parser(), given)
    keep_compiled()
    study = asked_study(flags, settings)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    if flags.alone is not None:
        run_seed(study, flags.workdir, flags.alone, flags.only)
        return 0
    again = (sys.executable, "-m", "focus_jax", "study", *given)
    found = run_study(study, flags.workdir, flags.size, flags.only, again, flags.jobs)
    write_json(flags.workdir / "results.json", to_json(found, command(given)))
    where: Path = flags.markdown or flags.workdir / "study.md"
    drawn = draw(found, where.parent, where.stem)
    names = {name: Path(path.name) for name, path in drawn.items()}
    write_text(where, page(found, command(given), names))
    print(summary(claims(found)), end="")
    return 0


def parser() -> Parser:
    """The study's own flags; all others set fields of its base experiment."""
    out = Parser(
        "python -m focus_jax study",
        description="Train FocusLLaVA, its parts and its controls on the embedded job, measure "
        "them, and judge each claim by a rule. What is finished is not repeated.",
        epilog="Other flags set fields of the base experiment, such as --data.directory DIR.",
    )
    out.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    out.add_argument("--workdir", type=Path, required=True, help="e.g. runs/study; resumes")
    out.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="the page, pictures beside it; default: study.md in the workdir",
    )  # fmt: skip
    out.add_argument(
        "--jobs", type=positive, default=1, metavar="N",
        help="seeds that are trained at once, each on its share of the cores",
    )  # fmt: skip
    out.add_argument("--alone", type=int, metavar="SEED", help=argparse.SUPPRESS)
    out.add_argument("--seeds", type=positive, metavar="N", help="the first N of the study's")
    out.add_argument(
        "--only", type=parts, default=PARTS, metavar="P[,P]",
        help=f"what to measure beside the arms: {', '.join(PARTS)} (all)",
    )  # fmt: skip
    return out


def parts(text: str) -> tuple[Part, ...]:
    """`placement,routing` as parts of the study, in the study's order."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: choose from {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in asked)


def asked_study(flags: argparse.Namespace, settings: Sequence[str]) -> Study:
    """The study of that size, with fewer seeds and other settings where asked for."""
    study = load_study(PROGRAM, flags.size)
    base = override(study.base, settings, "focus_jax study")
    if flags.seeds and flags.seeds > len(study.seeds):
        raise ValueError(f"--seeds {flags.seeds}: the study has {len(study.seeds)} seeds")
    return check(replace(study, base=base, seeds=study.seeds[: flags.seeds or None]))


def command(given: Sequence[str]) -> str:
    """The command line that makes the page again."""
    return f"python -m focus_jax study {shlex.join(given)}"


def to_json(found: Results, command: str) -> dict[str, Any]:
    """What results.json holds: every figure and verdict; single answers lie in the seeds' files."""
    return {
        "command": command,
        "size": found.size,
        "seeds": list(found.seeds),
        "images": found.images,
        "questions": int(found.kind.size),
        "device": found.device,
        "seconds": found.seconds,
        "chosen": found.chosen,
        "claims": [claim_json(claim) for claim in claims(found)],
        "rows": [row_json(found, row) for row in found.rows],
        "placement": [
            {
                "layer": c.layer, "keep": c.keep, "rank": c.rank, "queries": c.queries,
                "accuracy": share_right(c.correct)._asdict(),
                "to_full": loss_of(found, c)._asdict(),
            }
            for c in found.curves
        ],
        "routing": [asdict(one) for one in found.routed],
    }  # fmt: skip


def claim_json(claim: Claim) -> dict[str, Any]:
    """A claim with its verdict and the estimates of its checks: value, low, high, or None."""
    out = {**asdict(claim), "verdict": claim.verdict}
    for one, plain in zip(claim.checks, out["checks"], strict=True):
        plain["estimate"] = one.estimate._asdict() if one.estimate else None
    return out


def row_json(found: Results, row: Row) -> dict[str, Any]:
    """A row's figures."""
    plain = {
        name: getattr(row, name)
        for name in (
            "name", "role", "weights", "trained", "asked", "share", "mean_slots", "mean_share",
            "flops", "kv_bytes", "ms",
        )
    }  # fmt: skip
    estimates = {"accuracy": row.accuracy, "to_full": row.minus(found.full)}
    return (
        plain
        | {name: e._asdict() for name, e in estimates.items()}
        | {"by_kind": found.by_kind(row)}
    )


if __name__ == "__main__":
    sys.exit(main())
