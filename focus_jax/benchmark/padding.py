"""What padding costs when rows of one shape share a batch, and when they do not."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from focus_jax.data.dialogue_plan import DialoguePlan, needs_of
from focus_jax.data.preprocess import ImageConfig

# An assumed mixture of mix665k's size, not a measurement: share of rows, median and spread
# (standard deviation of the logarithm) of tokens, and sizes of photos with their shares.
COCO = (((640, 480), 0.55), ((480, 640), 0.2), ((640, 427), 0.15), ((427, 640), 0.1))
SCENES = (((500, 375), 0.5), ((800, 600), 0.2), ((640, 480), 0.2), ((375, 500), 0.1))
COVERS = (((333, 500), 0.7), ((400, 500), 0.3))
PHOTOS = (((1024, 768), 0.6), ((1024, 683), 0.2), ((768, 1024), 0.2))
MIXTURE = (
    ("text alone", 40_688, 700, 0.9, ()),
    ("conversations on COCO", 157_712, 350, 0.5, COCO),
    ("short answers on COCO", 206_792, 250, 0.6, COCO),
    ("scenes (GQA, Visual Genome)", 158_147, 400, 0.6, SCENES),
    ("book covers (OCR-VQA)", 80_000, 200, 0.3, COVERS),
    ("words in photos (TextVQA)", 21_953, 250, 0.5, PHOTOS),
)
LONGEST = 2048


class Drawn(NamedTuple):
    """Rows in random order: `DialogueSource.sizes`, and tokens."""

    sizes: Int[np.ndarray, "N 3"]
    lengths: Int[np.ndarray, " N"]


class Cost(NamedTuple):
    """Of an epoch: shares of padding in text, views and rows of the decoder; shapes to compile."""

    text: float
    views: float
    rows: float
    shapes: int


def draw(seed: int = 0) -> Drawn:
    """A data set of the mixture."""
    rng = np.random.default_rng(seed)
    sizes, lengths = [], []
    for _, count, median, spread, photos in MIXTURE:
        tokens = np.exp(rng.normal(np.log(median), spread, count))
        lengths.append(np.clip(tokens, 48, LONGEST).astype(np.int64))
        own = np.zeros((count, 3), np.int64)
        if photos:
            chosen = rng.choice(len(photos), count, p=[share for _, share in photos])
            own[:, 0] = 1
            own[:, 1:] = np.array([size for size, _ in photos])[chosen]
        sizes.append(own)
    order = rng.permutation(sum(part[1] for part in MIXTURE))
    return Drawn(np.concatenate(sizes)[order], np.concatenate(lengths)[order])


def grouped(drawn: Drawn, buckets: Sequence[int], images: ImageConfig, step: int) -> Cost:
    """Batches of our loader."""
    needs = needs_of(drawn.sizes, drawn.lengths, buckets, images)
    patches = (images.size // images.patch) ** 2
    plan = DialoguePlan(needs, step, patches)
    shapes = [(shape, count * step) for shape, count in plan.counts().items()]
    made_text = sum(shape.text * rows for shape, rows in shapes)
    made_views = sum(shape.images * shape.tiles * rows for shape, rows in shapes)
    return cost_of(drawn, needs, made_text, made_views, patches, len(shapes))


def together(drawn: Drawn, images: ImageConfig, step: int, longest: bool) -> Cost:
    """Batches of rows in random order: of one shape that fits all, or (`longest`) of their own
    longest text and most views, which is another shape nearly each time."""
    needs = needs_of(drawn.sizes, drawn.lengths, (LONGEST,), images)
    patches, steps = (images.size // images.patch) ** 2, len(needs) // step
    views = needs[:, 0] * needs[:, 1]
    if not longest:
        made = len(needs) * LONGEST, len(needs) * int(views.max())
        return cost_of(drawn, needs, *made, patches, 1)
    own = slice(steps * step)
    text = drawn.lengths[own].reshape(steps, step).max(1)
    most = views[own].reshape(steps, step).max(1)
    shapes = len(set(zip(text.tolist(), most.tolist(), strict=True)))
    kept = Drawn(drawn.sizes[own], drawn.lengths[own])
    return cost_of(
        kept, needs[own], int(text.sum()) * step, int(most.sum()) * step, patches, shapes
    )


def cost_of(
    drawn: Drawn, needs: Int[np.ndarray, "N 3"], text: int, views: int, patches: int, shapes: int
) -> Cost:
    """What is left of text and views that are made when what the rows hold is taken away."""
    held = int(drawn.lengths.sum()), int((needs[:, 0] * needs[:, 1]).sum())
    rows = held[0] + patches * held[1], text + patches * views
    return Cost(1 - held[0] / text, 1 - held[1] / views, 1 - rows[0] / rows[1], shapes)
