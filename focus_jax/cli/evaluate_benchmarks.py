"""`eval.py --benchmark`: a checkpoint on the field's benchmarks, with one method or several."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import jax

from focus_jax.cli.progress import SampleMeter
from focus_jax.data.conversation import TEMPLATES
from focus_jax.evaluate.benchmark import PROTOCOLS, Benchmark, Protocol, Sample
from focus_jax.evaluate.benchmarks.server import write_submission
from focus_jax.evaluate.lock import alone
from focus_jax.evaluate.results import BenchmarkResult, Difference, compare, page
from focus_jax.evaluate.runner import check_batch
from focus_jax.evaluate.study import write_json
from focus_jax.evaluate.suite import answers_file, find_folder, run_benchmark
from focus_jax.experiment import CompressConfig
from focus_jax.methods import method_to_json, parse_method, split_methods
from focus_jax.pipeline import Pipeline, load
from focus_jax.sharding import Layout, make_layout
from focus_jax.workdir import write_text

EVERY = "all"
# Questions at a time for each place that holds samples.
BATCH = 8


def add_flags(out: argparse.ArgumentParser) -> None:
    """The flags that --benchmark brings."""
    of = out.add_argument_group("benchmarks")
    of.add_argument("--benchmark", metavar="B[,B]", help="such as textvqa,pope; all: every one")
    of.add_argument(
        "--data", type=Path, metavar="DIR", help="a folder for each benchmark lies here"
    )
    of.add_argument("--protocol", choices=PROTOCOLS, help="prompts and rules; default: llava")
    of.add_argument(
        "--methods", metavar="M[,M]",
        help="several on the same samples, with differences from the first",
    )  # fmt: skip
    of.add_argument(
        "--out", type=Path, metavar="DIR",
        help="answers and tables; what is there is gone on with; default: "
        "runs/benchmarks/NAME of the checkpoint",
    )  # fmt: skip
    of.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU")
    of.add_argument("--preprocessing", choices=("original", "hf"), help="default: original")
    of.add_argument("--template", choices=[t.name for t in TEMPLATES], help="default: its own")
    of.add_argument("--vision-tower", metavar="DIR", help="for checkpoints in LLaVA's own layout")
    of.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint lacks its own")


# Flags that belong to --benchmark, and those of the embedded set.
OWN = (
    "data", "protocol", "methods", "out", "dtype", "preprocessing", "template", "vision_tower",
    "tokenizer",
)  # fmt: skip
EMBEDDED = ("split", "data_seed", "answers")


def check_flags(flags: argparse.Namespace) -> None:
    """ValueError for flags that do not go together."""
    names = EMBEDDED if flags.benchmark else OWN
    wrong = [name for name in names if getattr(flags, name) is not None]
    if wrong:
        flag = "--" + wrong[0].replace("_", "-")
        what = "belongs to the embedded set" if flags.benchmark else "goes with --benchmark"
        raise ValueError(f"{flag} {what}: leave one of them out")
    if flags.benchmark and flags.data is None:
        raise ValueError("--benchmark needs --data DIR, the folder in which benchmarks lie")
    if flags.method and flags.methods:
        raise ValueError("--method and --methods: give one of them")


def score(flags: argparse.Namespace) -> None:
    """Run all benchmarks with all methods; process 0 tells and writes.

    What flags and files have wrong is found before the checkpoint is read, which takes long.
    """
    protocol: Protocol = flags.protocol or "llava"
    chosen = with_folders(flags.benchmark, flags.data)
    layout = make_layout(flags.mesh)
    batch = flags.batch or BATCH * layout.ways("batch")
    check_batch(batch, layout)
    for method in methods_of(flags):
        parse_method(method, CompressConfig())
    out: Path = flags.out or Path("runs/benchmarks") / Path(flags.checkpoint.rstrip("/")).name
    with alone(out):
        asked = [
            (benchmark, folder, benchmark.read(folder, protocol)[: flags.limit or None])
            for benchmark, folder in chosen
        ]
        answer(flags, asked, with_methods(loaded(flags, layout), flags), batch, out)


def answer(
    flags: argparse.Namespace,
    asked: Sequence[tuple[Benchmark, Path, list[Sample]]],
    pipelines: Mapping[str, Pipeline],
    batch: int,
    out: Path,
) -> None:
    """All questions with all methods, and what they give, told behind each benchmark."""
    protocol: Protocol = flags.protocol or "llava"
    results: list[BenchmarkResult] = []
    gaps: list[Difference] = []
    for benchmark, folder, samples in asked:
        found = [
            one(pipeline, benchmark, samples, protocol, batch, out, name)
            for name, pipeline in pipelines.items()
        ]
        results += found
        if jax.process_index():
            continue
        gaps += compare(benchmark, samples, found)
        for result in found:
            submit(benchmark, folder, samples, result)
        # What is finished is told even where the next one fails.
        write(out, results, gaps)
    if jax.process_index() == 0:
        if flags.json:
            write_json(flags.json, to_json(results, gaps))
        print(page(results, gaps), end="")


def one(
    pipeline: Pipeline,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    protocol: Protocol,
    batch: int,
    out: Path,
    name: str,
) -> BenchmarkResult:
    """One method on one benchmark."""
    method = method_to_json(pipeline.vlm.method)
    path = answers_file(out / "answers", benchmark.name, protocol, method)
    with SampleMeter(f"{benchmark.name} {name}") as meter:
        return run_benchmark(
            pipeline, benchmark, samples, protocol=protocol, batch=batch, answers=path,
            progress=None if jax.process_index() else meter, name=name,
        )  # fmt: skip


# ------------------------------------------------------------------------------- what to run


def with_folders(names: str, data: Path) -> list[tuple[Benchmark, Path]]:
    """Benchmarks by name with their folders; for `all` those whose folder is there.

    ValueError for a name that is none; FileNotFoundError where a folder is missing.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"--data {data} is no folder: give the one in which benchmarks lie")
    if names != EVERY:
        return [(benchmark, find_folder(data, benchmark)) for benchmark in named(names)]
    found, missing = [], []
    for benchmark in known().values():
        try:
            found.append((benchmark, find_folder(data, benchmark)))
        except FileNotFoundError:
            missing.append(benchmark.name)
    if not found:
        raise FileNotFoundError(f"--data {data} has no benchmark's folder: {', '.join(missing)}")
    if missing and jax.process_index() == 0:
        print(f"left out, for {data} has no folder: {', '.join(missing)}", file=sys.stderr)
    return found


def known() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    from focus_jax.evaluate.benchmarks import BENCHMARKS

    return BENCHMARKS


def named(names: str) -> list[Benchmark]:
    """The benchmarks of a list such as `textvqa,pope`. ValueError names those near a wrong one."""
    every = known()
    out = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        if name not in every:
            near = get_close_matches(name, every, n=2)
            mend = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(every)}"
            raise ValueError(f"unknown benchmark {name!r}: {mend}")
        out.append(every[name])
    return out


def loaded(flags: argparse.Namespace, layout: Layout) -> Pipeline:
    """The checkpoint, over all devices where there are several."""
    template = next((t for t in TEMPLATES if t.name == flags.template), None)
    images: Literal["original", "hf"] = flags.preprocessing or "original"
    return load(
        flags.checkpoint, dtype=flags.dtype, images=images, template=template,
        vision_tower=flags.vision_tower, tokenizer=flags.tokenizer,
        layout=layout if layout.mesh.size > 1 else None,
    )  # fmt: skip


def with_methods(pipeline: Pipeline, flags: argparse.Namespace) -> dict[str, Pipeline]:
    """The checkpoint with each method that was asked for, by the words that did."""
    names = methods_of(flags)
    if not names:
        return {pipeline.vlm.method.name: pipeline}
    return {
        name: pipeline.with_method(pipeline.method(name), flags.init_samplers) for name in names
    }


def methods_of(flags: argparse.Namespace) -> list[str]:
    """The methods that were asked for, none for the checkpoint's own."""
    if flags.methods is None:
        return [flags.method] if flags.method else []
    return split_methods(flags.methods)


# ------------------------------------------------------------------------------- what is told


def submit(
    benchmark: Benchmark, folder: Path, samples: Sequence[Sample], result: BenchmarkResult
) -> None:
    """The file for whoever rates a benchmark whose gold answers are not here."""
    path = write_submission(benchmark, folder, samples, Path(result.answers))
    if path is not None:
        print(f"{benchmark.title} is rated elsewhere: give it {path}", file=sys.stderr)


def write(out: Path, results: Sequence[BenchmarkResult], gaps: Sequence[Difference]) -> None:
    """results.md and results.json."""
    write_json(out / "results.json", to_json(results, gaps))
    write_text(out / "results.md", page(results, gaps))


def to_json(results: Sequence[BenchmarkResult], gaps: Sequence[Difference]) -> dict[str, list]:
    """All results and differences as plain values."""
    return {
        "results": [result.to_json() for result in results],
        "differences": [gap._asdict() | {"gap": gap.gap._asdict()} for gap in gaps],
    }
