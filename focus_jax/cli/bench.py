"""`python -m focus_jax bench`: seconds, tokens a second and memory, beside transformers'.

Each side measures in a process of its own, on the same machine, sizes, dtype and inputs; the sides
take turns over the rounds, so that only one is in memory and a slow spell of the machine meets all.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from focus_jax.benchmark.job import BIG, PREFIX, Job, Measured, method_of, model_config, planned
from focus_jax.benchmark.report import SIDES, summary, table, words
from focus_jax.cli.arguments import Parser, argv_or, positive, whole_numbers
from focus_jax.cli.common import friendly


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Exit 0 when all sides have measured."""
    given = argv_or(argv)
    flags = parser().parse_args(given)
    if flags.worker:
        print(json.dumps(measure(job_from_json(flags.worker))))
        return 0
    if flags.methods or flags.profile:
        return bench_methods(flags)
    flags.batch, flags.new_tokens = flags.batch or (1, 8), flags.new_tokens or 32
    flags.rounds = flags.rounds or 3
    job = job_of(flags)
    plans = planned(job)
    sides = [side for side in SIDES if side != "hf" or flags.against == "hf"]
    rounds: list[dict[str, Measured]] = []
    for i in range(flags.rounds):
        rounds.append({})
        for side in sides:
            told = f"round {i + 1}/{flags.rounds}: {SIDES[side]}"
            print(told, "...", file=sys.stderr, flush=True)
            rounds[-1][side] = run(replace(job, side=side))
            print(told, words(rounds[-1][side]), file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        "job": {k: v for k, v in asdict(job).items() if k not in ("side", "hf_config")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "rounds": rounds,
        "rows": summary(rounds, plans),
    }
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = flags.json.with_name(flags.json.name + ".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, flags.json)
    print(table(report["rows"], sides), end="")
    return 0


def bench_methods(flags: Any) -> int:
    """Measure methods, or the parts of one, in this process: weights are made once for all."""
    from focus_jax.benchmark import figures, profile, sweep
    from focus_jax.benchmark.methods import chosen
    from focus_jax.benchmark.record import Record
    from focus_jax.compilation import keep_compiled

    flags.batch, flags.new_tokens = flags.batch or (1, 4), flags.new_tokens or 12
    job, names = job_of(flags), chosen(flags.methods or flags.profile)
    depth = model_config(job).decoder.layers
    big = min(depth, flags.big_layers or max(4, depth // 2))
    asked = sweep.Sweep(replace(job, side="full"), names, flags.rounds or 1, big)
    keep_compiled()
    if flags.profile:
        print(profile.profile_of(asked), end="")
        return 0
    out: Path | None = flags.out
    record = Record(out / "measurements.jsonl" if out else None, asked.settings())
    other = (lambda: run(replace(job, side="hf"))) if flags.against == "hf" else None
    sweep.measure(asked, record, other, tell)
    print(figures.report_of(asked, record, out), end="")
    return 0


def tell(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax bench",
        description="Speed and memory of a model, of a text-guided cut at a quarter of its depth, "
        "and of transformers.",
    )
    of = out.add_mutually_exclusive_group(required=True)
    of.add_argument("--checkpoint", type=Path, metavar="DIR", help="in Hugging Face's layout")
    of.add_argument("--preset", metavar="NAME", help="official sizes, random weights")
    of.add_argument("--worker", metavar="JOB", help="measure one side: used by this command")
    out.add_argument(
        "--methods", metavar="all|M[,M]", help="measure methods beside all tokens instead of a cut"
    )
    out.add_argument(
        "--profile", metavar="METHOD", help="where its time goes, part by part, and that of full"
    )
    out.add_argument(
        "--big-layers", type=positive, metavar="N",
        help=f"decoder layers for methods where a batch has {BIG} tiles or more; default: half, at "
        "least 4",
    )  # fmt: skip
    out.add_argument(
        "--out", type=Path, metavar="DIR",
        help="of methods: methods.md, .json, .png, and measurements.jsonl, by which a killed run "
        "goes on",
    )  # fmt: skip
    out.add_argument("--layers", type=positive, metavar="N", help="of a preset's decoder")
    out.add_argument("--against", choices=("hf", "none"), default="hf", help="the other side")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    out.add_argument(
        "--tiles", type=whole_numbers, default=(1, 5), metavar="N[,N]", help="thumbnail included"
    )
    out.add_argument(
        "--batch",
        type=whole_numbers,
        metavar="N[,N]",
        help="in decode, 1,8; of methods in all parts, 1,4",
    )
    out.add_argument("--text", type=positive, default=48, metavar="N", help="tokens of a prompt")
    out.add_argument(
        "--new-tokens", type=positive, metavar="N", help="in decode, 32; of each method, 12"
    )
    out.add_argument("--keep", type=float, default=0.25, help="share that the cut leaves")
    out.add_argument(
        "--attention", choices=("xla", "blocked", "cudnn"),
        help="of focus_jax: blocked is for CPUs, cudnn for NVIDIA GPUs",
    )  # fmt: skip
    out.add_argument("--rounds", type=positive, metavar="N", help="3; of methods 1")
    out.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    return out


def job_of(flags: Any) -> Job:
    """What the flags ask for, checked before any process starts."""
    import jax

    from focus_jax.compress.plan import plan
    from focus_jax.hf_write import config_json
    from focus_jax.models.vlm import dims_of, sizes_of

    if flags.layers and flags.checkpoint:
        raise ValueError("--layers goes with --preset: a checkpoint has the layers it has")
    if flags.new_tokens < 2:
        raise ValueError("--new-tokens 1: the first one comes from the prompt, give at least 2")
    if flags.text <= PREFIX:
        raise ValueError(f"--text {flags.text}: {PREFIX} stand before the image, give more")
    job = Job(
        "full", str(flags.checkpoint or ""), flags.preset or "", flags.layers or 0, flags.dtype,
        flags.tiles, flags.batch, flags.text, flags.new_tokens, flags.keep,
        flags.attention or ("blocked" if jax.default_backend() == "cpu" else "xla"),
    )  # fmt: skip
    cfg = model_config(job)
    fitting = tuple(n for n in job.tiles if n <= cfg.max_tiles)
    if not fitting:
        raise ValueError(f"--tiles {job.tiles}: the model takes up to {cfg.max_tiles}")
    other = flags.against == "hf"
    plans = [
        plan(method_of(job, cfg), dims_of(cfg, n), sizes_of(cfg), text_tokens=job.text - PREFIX)
        for n in fitting
    ]
    return replace(
        job,
        tiles=fitting,
        visual=tuple(p.full for p in plans),
        hf_config=config_json(cfg, job.dtype, cfg.decoder.vocab_size - 1, {}) if other else None,
    )


def job_from_json(text: str) -> Job:
    given = json.loads(text)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Job(**values)


def run(job: Job) -> Measured:
    """One side in a fresh process. ValueError with the end of what it said if it fails."""
    command = [sys.executable, "-m", "focus_jax.cli.bench", "--worker", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip()[-2000:] or f"exit {done.returncode} (out of memory?)"
        raise ValueError(f"{SIDES[job.side]} did not finish: {why}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(job: Job) -> Measured:
    """All rows of one side, in this process; a side imports only what it needs."""
    if job.side == "hf":
        from focus_jax.benchmark.theirs import measure_hf

        return measure_hf(job)
    from focus_jax.benchmark.ours import measure_ours

    return measure_ours(job)


if __name__ == "__main__":
    sys.exit(main())
