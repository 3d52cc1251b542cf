"""What a benchmark is: questions read from its files, answers rated one by one, and figures of all.

A benchmark is a value; each has a file of its own in `benchmarks/`. Readers keep images where they
are (a path, or a function that reads them), so that a large benchmark costs little memory.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Whose prompts and scoring rules: those of LLaVA's own scripts, or of lmms-eval's tasks.
Protocol = Literal["llava", "lmms-eval"]
PROTOCOLS: tuple[Protocol, ...] = ("llava", "lmms-eval")
# An image file, or a function that gives its bytes.
Picture = Path | Callable[[], bytes]
Figures = dict[str, float]


class Sample(NamedTuple):
    """One question as the model gets it.

    `id` is unique within the benchmark. `prompt` is the user's whole text, suffix included, without
    image markers, unless the images stand at "<image>" within it. `gold`: what rating needs, as
    JSON values (answers, choices, category). `unit`: what is drawn together when an interval is
    estimated, such as the image that several questions share.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    gold: Mapping[str, Any]
    unit: Hashable = None


class Rating(NamedTuple):
    """One answer rated: its score, in the mean of which a benchmark's figure usually lies, and
    what was read from it (for the answer file)."""

    score: float
    parsed: Any = None


Rate = Callable[[Sample, str, Protocol], Rating]
Summarise = Callable[[Sequence[Sample], Sequence[Rating], Protocol], Figures]
# What the file holds that a benchmark's server takes, from its folder, samples and answers.
Submission = Callable[
    [Path, Sequence[Sample], Sequence[str]], list[dict[str, Any]] | dict[str, Any]
]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's files, prompts, rule and published figures.

    `read(folder, protocol)`: all samples, in the files' order, from the authors' own layout,
    LLaVA's evaluation layout or lmms-eval's parquet files, whichever is there; FileNotFoundError
    names what was looked for. `rate`: one answer. `summarise`: figures on the scale that papers
    print, `headline` among them. `is_mean`: the headline is 100 x the mean of the ratings' scores.
    `scale`: the most that the headline can be.
    `submission`: the file for the benchmark's own server, where samples have no gold answers and
    `summarise` gives no figures. `published`: a model's figure by its name. `judge`: for benchmarks
    that a language model rates, what to do with the answer file; they have no figures of their own.
    """

    name: str
    title: str
    metric: str
    read: Callable[[Path, Protocol], list[Sample]]
    rate: Rate
    summarise: Summarise
    headline: str = "accuracy"
    is_mean: bool = True
    scale: float = 100.0
    max_new_tokens: int = 128
    published: Mapping[str, float] = field(default_factory=dict)
    judge: str = ""
    submission: Submission | None = None
    # Other names of its folder below the data's root.
    folders: tuple[str, ...] = ()


def mean(samples: Sequence[Sample], ratings: Sequence[Rating], protocol: Protocol) -> Figures:
    """The usual figure: 100 x the mean score."""
    return {"accuracy": 100 * sum(rating.score for rating in ratings) / len(ratings)}
