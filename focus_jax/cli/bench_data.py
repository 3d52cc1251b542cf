"""`python -m focus_jax.cli.bench_data`: loading beside torch's DataLoader; what padding costs."""

import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from focus_jax.benchmark import loading, padding
from focus_jax.benchmark.record import machine
from focus_jax.cli.arguments import Parser, argv_or, positive, whole_numbers
from focus_jax.cli.common import friendly
from focus_jax.data.preprocess import ImageConfig
from focus_jax.workdir import write_text

COMMAND = "python -m focus_jax.cli.bench_data"
STEP = 128


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a page or write it."""
    out = Parser(COMMAND, description="Images a second of the loader, and shares of padding.")
    out.add_argument("--rounds", type=positive, default=7, help="the sides alternate this often")
    out.add_argument("--images", type=positive, default=64, help="JPEGs of a pass")
    out.add_argument(
        "--lengths", type=whole_numbers, default=(64, 256, 512, 1024, 2048), metavar="N,N",
        help="sizes that text is padded to",
    )  # fmt: skip
    out.add_argument("--markdown", type=Path, metavar="PAGE", help="write the page here")
    flags = out.parse_args(argv_or(argv))
    speed = speed_table(flags.images, flags.rounds)
    lines = [*head(flags.images, flags.rounds), *speed, *padding_part(flags.lengths)]
    page = "\n".join(wrapped(line) for line in lines)
    if flags.markdown:
        write_text(flags.markdown, page + "\n")
    print(page)
    return 0


def head(images: int, rounds: int) -> list[str]:
    """What was measured, how, and on what."""
    on = machine()
    return [
        "# Loading training data", "",
        f"`{COMMAND} --markdown benchmarks/data.md`", "",
        f"{on['device']}, {on['system']}, Python {on['python']}. One process, one core: images per "
        "second of the process's CPU time, so that a busy machine matters less. Both sides read "
        f"the same {images} JPEGs of 640x480 to 1600x1200, in turns, {rounds} rounds behind one "
        "that is not counted; medians, and ratios with their range over the rounds.", "",
        "Ours: the training loader from ArrayRecord to batches (JPEG, tiles, tokens, masks, static "
        "shapes), no threads; pixels stay uint8, the tower normalises. Theirs: torch's DataLoader "
        "without workers, transformers' PIL processors (LLaVA-NeXT's; LLaVA's with padding) and "
        "the same tokenizer, no masks; ends in normalised float32.", "",
    ]  # fmt: skip


def speed_table(images: int, rounds: int) -> list[str]:
    """Both layouts, as a Markdown table."""
    # Only this command needs it: the photographs are scikit-learn's.
    from sklearn.datasets import load_sample_images

    lines = ["| photos | ours | torch + transformers | ours / theirs |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        files = loading.write_files(Path(folder) / "data", load_sample_images().images, images)
        for layout in ("anyres", "pad"):
            found = loading.compare(files, layout, rounds)
            ratios = found.ratios
            lines.append(
                f"| {layout} 336 | {np.median(found.ours):.1f} | {np.median(found.theirs):.1f} | "
                f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f}) |"
            )
    return lines


def padding_part(lengths: Sequence[int]) -> list[str]:
    """Shares of padding of an epoch, as a Markdown section."""
    images = ImageConfig("anyres", loading.SIZE, pinpoints=loading.POINTS)
    drawn = padding.draw()
    few = tuple(length for length in lengths if length >= 512)
    ways = [
        (f"grouped, lengths {', '.join(map(str, own))}", padding.grouped(drawn, own, images, STEP))
        for own in (lengths, few)
    ]
    ways += [
        ("random order, own longest", padding.together(drawn, images, STEP, longest=True)),
        ("random order, one shape", padding.together(drawn, images, STEP, longest=False)),
    ]
    parts = "; ".join(
        f"{name} {count:,} rows, {median} tokens (spread {spread})"
        for name, count, median, spread, _ in padding.MIXTURE
    )
    return [
        "", "## Padding", "",
        f"An epoch of {len(drawn.lengths):,} rows in steps of {STEP}, any-resolution tiles of 336. "
        "The rows are drawn from an assumed mixture of mix665k's size and kinds, not from the "
        "data: log-normal tokens (median, standard deviation of the logarithm; 48 to "
        f"{padding.LONGEST}): {parts}; sizes of photos as in `benchmark/padding.py`. Rows of the "
        "decoder: text, and 576 for each view, of all tokens.", "",
        "| batches | text padding | view padding | decoder rows padding | shapes |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {c.text:.1%} | {c.views:.1%} | {c.rows:.1%} | {c.shapes} |"
            for name, c in ways
        ),
    ]  # fmt: skip


def wrapped(line: str) -> str:
    """A paragraph in lines for reading; tables stay as they are."""
    return line if line.startswith("|") else textwrap.fill(line, 100, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
