"""`data check`: looks at a data set of dialogues, built or not, and reports what is in it."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from focus_jax.cli.arguments import Meter, not_negative, positive
from focus_jax.data.build import BAD_ROWS, BuildConfig
from focus_jax.data.built import open_built
from focus_jax.data.check_report import as_markdown, draw_histograms
from focus_jax.data.conversation import TEMPLATES, Template
from focus_jax.data.dialogue import DialogueSource
from focus_jax.data.inputs import add_input_flags, names_rows, open_inputs
from focus_jax.data.preprocess import ImageConfig
from focus_jax.data.samples import sample_panels, varied
from focus_jax.data.sheet import draw_sheet
from focus_jax.data.survey import figures, survey
from focus_jax.data.tokenizer import read_tokenizer
from focus_jax.data.unbuilt import Unbuilt
from focus_jax.experiment import DataConfig
from focus_jax.hf_config import NEXT_PINPOINTS
from focus_jax.workdir import write_text

JSON, TEXT, LENGTHS, SHEET = "check.json", "check.md", "histograms.png", "samples.png"
# So many bad rows are named; all of them are counted.
_NAMED = 20
_TEMPLATES = {template.name: template for template in TEMPLATES}
_PHOTOS = {
    "anyres": ImageConfig("anyres", pinpoints=tuple((w, h) for w, h in NEXT_PINPOINTS)),
    "pad": ImageConfig("pad"),
}


@dataclass(frozen=True)
class Look:
    """How a data set is looked at. `sample`: rows on the sheet; `rows`: at most so many, 0: all."""

    template: Template
    tokenizer: PreTrainedTokenizerBase | None
    lengths: tuple[int, ...]
    photos: ImageConfig
    sample: int
    rows: int
    seed: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `data check`."""
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, metavar="DATASET_DIR", help="what `data build` wrote")
    add_input_flags(parser)
    add("--decode", action="store_true", help="all of each image, not its header only")
    add("--tokenizer", type=Path, metavar="DIR", help="without one, tokens are not counted")
    add("--template", choices=tuple(_TEMPLATES), default="vicuna_v1",
        help="default: %(default)s")  # fmt: skip
    add("--lengths", type=lengths, default=DataConfig.lengths, metavar="N[,N]",
        help="where texts might be cut; default: 512,1024,2048")  # fmt: skip
    add("--photos", choices=tuple(_PHOTOS), default="anyres",
        help="how images become tiles; default: %(default)s")  # fmt: skip
    add("--rows", type=not_negative, default=0, metavar="N",
        help="look at so many, drawn at random; default: all")  # fmt: skip
    add(
        "--sample",
        type=not_negative,
        default=12,
        metavar="N",
        help="rows on the sheet; default: 12",
    )
    add("--seed", type=not_negative, default=0, metavar="N", help="of rows drawn at random")
    add("--out", type=Path, default=Path("runs/check"), metavar="DIR", help="default: %(default)s")


def lengths(text: str) -> tuple[int, ...]:
    """`512,1024` as numbers, ascending."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def run(flags: argparse.Namespace) -> int:
    """Look, write check.json, check.md, histograms.png and samples.png, and print check.md."""
    look = Look(
        _TEMPLATES[flags.template],
        None if flags.tokenizer is None else offsets_tokenizer(flags.tokenizer),
        flags.lengths, _PHOTOS[flags.photos], flags.sample, flags.rows, flags.seed,
    )  # fmt: skip
    source, bad = open_source(flags, look)
    flags.out.mkdir(parents=True, exist_ok=True)
    print(check(source, bad, look, flags.out, Meter("tokens of rows")))
    print(f"wrote {JSON}, {TEXT} and pictures into {flags.out}", file=sys.stderr)
    return 0


def offsets_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, as training reads it. ValueError: it knows no offsets."""
    tokenizer = read_tokenizer(directory)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {directory} gives no character offsets, of which masks are made: "
            "give a directory with tokenizer.json"
        )
    return tokenizer


def open_source(
    flags: argparse.Namespace, look: Look
) -> tuple[DialogueSource, list[dict[str, Any]]]:
    """What is looked at, and its bad rows. ValueError: not exactly one of the two was given."""
    unbuilt = names_rows(flags)
    if (flags.dataset is not None) == unbuilt:
        raise ValueError(
            "give a DATASET_DIR that `data build` wrote, or rows that are not built (--json FILE, "
            "--parquet FILE, --webdataset DIR): one of the two"
        )
    if flags.dataset is not None:
        built = open_built(flags.dataset)
        text = (flags.dataset / BAD_ROWS).read_text(encoding="utf-8")
        return built, [json.loads(line) for line in text.splitlines()]
    rows, images = open_inputs(flags)
    total = sum(map(len, rows))
    if not total:
        raise ValueError("there are no rows: the sources are empty")
    chosen = drawn(total, look.rows, look.seed)
    found = Unbuilt(rows, images, BuildConfig().max_pixels, flags.decode, chosen, Meter("rows"))
    return found, [json.loads(row.to_json()) for row in found.bad]


def drawn(total: int, wanted: int, seed: int) -> list[int]:
    """So many of the numbers below `total`, at random but ascending; all for 0."""
    if not 0 < wanted < total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, wanted, replace=False).tolist())


def check(
    source: DialogueSource,
    bad: Sequence[dict[str, Any]],
    look: Look,
    out: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write the four files into the folder `out`; returns what check.md says.

    `bad`: rows that the source left out, as `BadRow.to_json` has them.
    """
    rows = drawn(len(source), look.rows, look.seed)
    found = survey(source, rows, look.tokenizer, look.template, look.lengths, look.photos, tell)
    shown = [rows[place] for place in varied(source.sizes[rows, 0], look.sample, look.seed)]
    panels = sample_panels(source, shown, look.tokenizer, look.template, look.lengths[-1])
    bad = [*bad, *(_as_bad(index, "encoding", why) for index, why in found.failed)]
    # Without images that were given, there is none to be read.
    unread = [panel for panel in panels if panel.broken and source.sizes[panel.row, 1]]
    bad += [_as_bad(panel.row, "image of a sample", panel.broken) for panel in unread]
    told = {
        "source": source.about(),
        "examples": len(source),
        "template": look.template.name,
        "tokenizer": look.tokenizer.name_or_path if look.tokenizer else None,
        **figures(found),
        "bad_rows": len(bad),
        "bad_rows_by_kind": dict(sorted(Counter(row["kind"] for row in bad).items())),
        "first_bad_rows": bad[:_NAMED],
    }
    text = as_markdown(told)
    if rows:
        draw_histograms(out / LENGTHS, found, look.lengths)
    if panels:
        heading = (
            f"{len(panels)} of {len(source)} rows, template {look.template.name}"
            "   (□: a character that no font here has)"
        )
        draw_sheet(out / SHEET, heading, panels)
    write_text(out / JSON, json.dumps(told, indent=1) + "\n")
    write_text(out / TEXT, text)
    return text


def _as_bad(index: int, kind: str, reason: str) -> dict[str, Any]:
    return {"file": "", "line": 0, "row": index, "id": "", "kind": kind, "reason": reason}
