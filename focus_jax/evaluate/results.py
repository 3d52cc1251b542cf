"""What benchmarks gave: results as values, differences between methods, and tables of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from focus_jax.evaluate.benchmark import Benchmark, Figures, Protocol, Rating, Sample
from focus_jax.evaluate.intervals import Interval, difference
from focus_jax.evaluate.published import NOTES
from focus_jax.report import markdown_table


@dataclass(frozen=True)
class BenchmarkResult:
    """A method's figures on a benchmark, and what an answer costs.

    `score`: the headline with its 95 % interval; None where a judge or a server has to rate.
    `unreadable`, `too_long`: questions without an answer, which count as wrong. `visual_tokens`:
    slots by the plan, the mean over decoder layers and samples; `share_of_full` of all patches'.
    `seconds_per_sample`: prefill and greedy decoding once compiled, each shape's median over its
    batches; None where nothing was left to run. `prompt`: the first sample's, to the letter.
    """

    benchmark: str
    title: str
    metric: str
    protocol: Protocol
    checkpoint: str
    method: str
    headline: str
    score: float | None
    low: float | None
    high: float | None
    figures: Figures
    published: Mapping[str, float]
    n: int
    unreadable: int
    too_long: int
    visual_tokens: float
    share_of_full: float
    seconds_per_sample: float | None
    batch: int
    device: str
    prompt: str
    answers: str
    judge: str
    ratings: tuple[Rating, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ratings stand in the answer file."""
        return {
            f.name: dict(v) if isinstance(v := getattr(self, f.name), Mapping) else v
            for f in fields(self)
            if f.name != "ratings"
        }


class Difference(NamedTuple):
    """A method's headline minus another's on the same samples."""

    benchmark: str
    protocol: Protocol
    method: str
    minus: str
    gap: Interval
    n: int


def compare(
    benchmark: Benchmark, samples: Sequence[Sample], results: Sequence[BenchmarkResult]
) -> list[Difference]:
    """The other methods' headlines minus the first's, on the same samples."""
    if not results or results[0].score is None:
        return []
    first, *others = results
    return [
        Difference(
            benchmark.name, other.protocol, other.method, first.method,
            difference(benchmark, samples, other.ratings, first.ratings, first.protocol), first.n,
        )
        for other in others
    ]  # fmt: skip


# ------------------------------------------------------------------------------- tables


def table(results: Sequence[BenchmarkResult]) -> str:
    """One line for each result: score, interval, published figures, tokens and seconds."""
    return markdown_table(
        [line(result) for result in results],
        [
            ("title", "benchmark", ""),
            ("headline", "figure", ""),
            ("protocol", "protocol", ""),
            ("method", "method", ""),
            ("score", "score", ".1f"),
            ("interval", "95 % interval", ""),
            ("published", "published", ""),
            ("n", "n", "d"),
            ("tokens", "mean visual tokens", ""),
            ("seconds_per_sample", "seconds a sample", ".4f"),
            ("unanswered", "unanswered", ""),
        ],
    )


def line(result: BenchmarkResult) -> dict[str, Any]:
    """A result in a table's words."""
    parts = [f"{n} {what}" for n, what in lost(result) if n]
    return {
        **result.to_json(),
        "interval": span(result.low, result.high),
        "published": published(result) or None,
        "tokens": f"{result.visual_tokens:.1f} ({result.share_of_full:.1%})",
        "unanswered": ", ".join(parts) or "0",
    }


def lost(result: BenchmarkResult) -> tuple[tuple[int, str], ...]:
    """Questions without an answer, by why: they count as wrong."""
    return (result.unreadable, "unreadable"), (result.too_long, "too long")


def span(low: float | None, high: float | None, form: str = ".1f") -> str | None:
    """An interval in words; None where there is none."""
    return None if low is None or high is None else f"{low:{form}} to {high:{form}}"


def published(result: BenchmarkResult) -> str:
    """The published figures of the checkpoint's model, where its name tells which; else all."""
    own = plain(Path(result.checkpoint).name).replace("vicuna", "")
    told = result.published
    found = {model: told[model] for model in told if plain(model.partition(" ")[0]) in own}
    return ", ".join(f"{value:g} ({model})" for model, value in (found or told).items())


def plain(name: str) -> str:
    """A model's name whichever way it is written: `llava-v1.6` is LLaVA-NeXT."""
    words = name.lower().replace("v1.6", "next").replace("v1.5", "1.5")
    return "".join(c for c in words if c.isalnum())


def differences(gaps: Sequence[Difference]) -> str:
    """One line for each difference; "" where there is none."""
    if not gaps:
        return ""
    rows = [
        {
            **gap._asdict(),
            "value": gap.gap.value,
            "interval": span(gap.gap.low, gap.gap.high, "+.1f"),
        }
        for gap in gaps
    ]
    return markdown_table(
        rows,
        [
            ("benchmark", "benchmark", ""),
            ("method", "method", ""),
            ("minus", "minus", ""),
            ("value", "difference", "+.1f"),
            ("interval", "95 % interval", ""),
            ("n", "n", "d"),
        ],
    )


def page(results: Sequence[BenchmarkResult], gaps: Sequence[Difference] = ()) -> str:
    """The table, paired differences, what the figures are and the others beside them, each
    benchmark's first prompt, and what a judge is to be given."""
    parts = [table(results)]
    if gaps:
        parts.append("Paired differences, on the same samples:\n\n" + differences(gaps))
    parts.append("".join(dict.fromkeys(meaning(result) for result in results)))
    parts.append("".join(others(result) for result in results))
    firsts = {(r.title, r.protocol): r.prompt for r in results}
    parts += [
        f"First prompt of {title} ({protocol}):\n\n```text\n{prompt}\n```\n"
        for (title, protocol), prompt in firsts.items()
    ]
    parts += [f"{r.judge}. With {r.method}: {r.answers}\n" for r in results if r.judge]
    return "\n".join(filter(None, parts))


def meaning(result: BenchmarkResult) -> str:
    """What a benchmark's figure is, and what the published ones are of, as a line of a list."""
    note = NOTES.get(result.benchmark, "") if result.published else ""
    return f"- {result.title}: {result.metric}" + (f"; published: {note}\n" if note else "\n")


def others(result: BenchmarkResult) -> str:
    """The figures that a result has beside its headline, as a line of a list."""
    rest = [f"{name} {v:.2f}" for name, v in result.figures.items() if name != result.headline]
    head = f"- {result.title}, {result.protocol}, {result.method}: "
    return head + ", ".join(rest) + "\n" if rest else ""
