"""What a data set of dialogues holds, in figures: lengths, images, what is learnt, what is cut."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from focus_jax.data.conversation import IMAGE, EncodedDialogue, Template, encode_dialogue
from focus_jax.data.dialogue import DialogueSource, Exchange
from focus_jax.data.preprocess import ImageConfig, layout_of

_QUANTILES = {"min": 0, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1}


@dataclass
class Cut:
    """What cutting at `length` tokens takes from R rows that it touches."""

    length: int
    rows: int = 0
    learnt_lost: int = 0
    images_lost: int = 0
    nothing_learnt: int = 0


@dataclass
class Survey:
    """Figures of R rows that were looked at. Lists hold one number a row, in order.

    `tokens`, `learnt`, `asked` are empty without a tokenizer. `failed`: rows that could not be
    encoded, and why. `odd`: rows by what is odd about them.
    """

    images: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)
    sizes: Int64[np.ndarray, "I 2"] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    tiles: list[int] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)


def survey(
    source: DialogueSource,
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
    lengths: Sequence[int],
    photos: ImageConfig,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Look at rows of a source; images by the sizes that it knows, the largest of each row.

    `lengths`: where texts might be cut. `tell` hears of every row.
    """
    out = Survey(cuts=[Cut(length) for length in sorted(lengths)])
    for done, index in enumerate(rows, start=1):
        turns, images = source.texts(index), int(source.sizes[index, 0])
        out.images.append(images)
        out.turns.append(len(turns))
        out.characters.append(sum(len(text) for turn in turns for text in turn))
        out.odd.update(oddities(turns, template))
        if tokenizer is not None:
            try:
                count(out, encode_dialogue(tokenizer, template, turns, images))
            except ValueError as error:
                out.failed.append((index, str(error)))
        tell(done, len(rows))
    look_at_sizes(out, source.sizes[np.asarray(rows, np.int64)], photos)
    return out


def oddities(turns: Sequence[Exchange], template: Template) -> list[str]:
    """What is odd about a row, which may be right all the same."""
    users = [user.replace(IMAGE, "").strip() for user, _ in turns]
    answers = [answer for _, answer in turns]
    ending = template.end.strip()
    found = {
        "an empty answer": not all(answer.strip() for answer in answers),
        "a question of white space alone": not all(users),
        f"an answer that holds {ending!r}": bool(ending) and any(ending in a for a in answers),
        f"an answer that holds {IMAGE!r}": any(IMAGE in answer for answer in answers),
    }
    return [name for name, true in found.items() if true]


def count(out: Survey, text: EncodedDialogue) -> None:
    """Take in a row's tokens."""
    out.tokens.append(len(text.ids))
    out.learnt.append(int(text.label_mask.sum()))
    out.asked.append(int(text.query_mask.sum()))
    for cut in out.cuts:
        if len(text.ids) > cut.length:
            cut.rows += 1
            cut.learnt_lost += int(text.label_mask[cut.length :].sum())
            cut.images_lost += sum(at >= cut.length for at in text.image_at)
            cut.nothing_learnt += not text.label_mask[: cut.length].any()


def look_at_sizes(out: Survey, sizes: np.ndarray, photos: ImageConfig) -> None:
    """Take in images' sizes [R 3]; each size is laid out once."""
    out.sizes = sizes[sizes[:, 1] > 0, 1:].astype(np.int64)
    found, inverse = np.unique(out.sizes, axis=0, return_inverse=True)
    layouts = [layout_of((int(width), int(height)), photos) for width, height in found]
    views = photos.layout == "anyres"  # the thumbnail is a tile of its own
    for number in inverse.ravel().tolist():
        rows, cols = layouts[number].grid
        out.tiles.append(rows * cols + views)
        out.visual.append(layouts[number].tokens)


def figures(out: Survey) -> dict[str, Any]:
    """A survey as JSON: quantiles of what has one number a row, shares and counts."""
    per_row = Counter(out.images)
    told: dict[str, Any] = {
        "rows": len(out.turns),
        "rows_by_images": {str(number): per_row[number] for number in sorted(per_row)},
        "turns": quantiles(out.turns),
        "characters": quantiles(out.characters),
        "odd": dict(sorted(out.odd.items())),
    }
    if out.tokens:
        total = sum(out.tokens)
        told |= {
            "tokens": quantiles(out.tokens),
            "learnt_tokens": quantiles(out.learnt),
            "learnt_share": sum(out.learnt) / total,
            "asked_share": sum(out.asked) / total,
            "rows_without_learnt_tokens": out.learnt.count(0),
            "cuts": [as_shares(cut, len(out.tokens), sum(out.learnt)) for cut in out.cuts],
        }
    if len(out.sizes):
        told |= {
            "width": quantiles(out.sizes[:, 0]),
            "height": quantiles(out.sizes[:, 1]),
            "rows_by_tiles": {str(n): c for n, c in sorted(Counter(out.tiles).items())},
            "visual_tokens": quantiles(out.visual),
        }
    return told


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Quantiles (each a value that occurs), mean and sum; nothing for no values."""
    if not len(values):
        return {}
    array = np.asarray(values)
    found = np.quantile(array, list(_QUANTILES.values()), method="inverted_cdf").tolist()
    whole = {"mean": float(array.mean()), "sum": int(array.sum())}
    return dict(zip(_QUANTILES, found, strict=True)) | whole


def as_shares(cut: Cut, rows: int, learnt: int) -> dict[str, Any]:
    """A cut as JSON."""
    return {
        "length": cut.length,
        "rows": cut.rows,
        "share_of_rows": cut.rows / rows,
        "share_of_learnt_tokens_lost": cut.learnt_lost / learnt if learnt else 0.0,
        "images_lost": cut.images_lost,
        "rows_left_without_learnt_tokens": cut.nothing_learnt,
    }
