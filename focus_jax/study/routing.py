"""Whether a vision-guided sampler sends its tokens where the glyphs are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from focus_jax.compress.method import Context
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.data.cells import at_patches
from focus_jax.models.vlm import VLM
from focus_jax.objectives import inputs_of
from focus_jax.study.answers import Batch, device_part, image_keys
from focus_jax.study.statistics import ranks, spearman

MOST = 4  # glyphs of a region from which on they are counted together


class Regions(NamedTuple):
    """Each region's glyphs and the tokens spent on it; `finest`: what the finest scale spends."""

    content: Int[np.ndarray, " R"]
    tokens: Int[np.ndarray, " R"]
    finest: int


@dataclass(frozen=True)
class Group:
    """Regions with `low` to `high` glyphs: how many, and the share of them at the finest scale."""

    low: int
    high: int
    n: int
    share: float
    mean_tokens: float


@dataclass(frozen=True)
class Routing:
    """How a sampler's tokens follow the glyphs, over all regions of a split.

    `correlation`: Spearman's, of tokens with glyphs (None where either is constant). `filled` and
    `empty`: the share of the finest scale among regions with and without glyphs (None: there are
    none). `deciles`: groups by content of equal size where ties allow. `counts`: regions with 0, 1,
    2, 3, and 4 or more glyphs.
    """

    regions: int
    finest_share: float
    correlation: float | None
    filled: float | None
    empty: float | None
    deciles: tuple[Group, ...]
    counts: tuple[Group, ...]

    @property
    def tokens(self) -> float:
        """Tokens spent on all regions together."""
        return sum(group.n * group.mean_tokens for group in self.counts)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return asdict(self)


def route(model: VLM, batches: Sequence[Batch], key: Array | None = None) -> Regions:
    """The regions of a split's images under a model whose method has a vision-guided sampler.

    Those of every view that it samples; a thumbnail's patch holds a glyph if any of its cells does.
    Padding, unreadable images and regions without a valid patch are left out. `key` as for
    `answer`. Models that differ in weights alone share one compiled program.
    ValueError: another vision stage, or batches without `cell_filled`.
    """
    stage = model.method.vision
    if not isinstance(stage, VisionGuided):
        raise ValueError(
            f"method {model.method.name!r} has no vision-guided sampler, whose regions are asked "
            "for: use focusllava or vision_only"
        )
    key = jax.random.key(0) if key is None else key
    content, tokens = [], []
    for batch in batches:
        if "cell_filled" not in batch:
            raise ValueError(
                "the batches do not tell which cells hold a glyph (`cell_filled`): make them with "
                "`read_batches`"
            )
        spent = np.asarray(spend(model, device_part(batch), image_keys(key, batch)))
        filled = at_patches(np.asarray(batch["cell_filled"]), batch["patch_valid"].shape[-1])
        # A thumbnail that keeps every patch has no regions.
        glyphs = glyphs_of(filled[:, -spent.shape[1] :], stage.region)
        real = np.any(batch["row_valid"], axis=-1)[:, None, None] & (spent > 0)
        content.append(glyphs[real])
        tokens.append(spent[real])
    return Regions(np.concatenate(content), np.concatenate(tokens), stage.cost[-1])


def tokens_spent(vlm: VLM, batch: Mapping[str, Array], keys: Array) -> Int[Array, "B M R"]:
    """Tokens that the sampler spends on each region."""
    _, aux = vlm.see(inputs_of(batch), Context(keys))
    return aux.maps["vision/tokens_per_region"]


spend = jax.jit(tokens_spent)


def glyphs_of(filled: Bool[np.ndarray, "*B N"], region: int) -> Int[np.ndarray, "*B R"]:
    """Glyphs of each square region of `region` x `region` patches of a view, row-major."""
    lead, side = filled.shape[:-1], round(filled.shape[-1] ** 0.5)
    up = side // region
    grid = filled.reshape(*lead, up, region, up, region)
    return grid.sum((-3, -1)).reshape(*lead, up * up)


def summarise(regions: Regions) -> Routing:
    """The figures of `Routing`. ValueError for fewer than two regions."""
    content, tokens, _ = regions
    correlation = spearman(tokens, content)
    finest = tokens == regions.finest
    return Routing(
        regions=len(content),
        finest_share=float(finest.mean()),
        correlation=correlation,
        filled=mean_of(finest[content > 0]),
        empty=mean_of(finest[content == 0]),
        deciles=groups_by(regions, deciles(content)),
        counts=groups_by(regions, np.minimum(content, MOST)),
    )


def mean_of(values: np.ndarray) -> float | None:
    """The mean; None of nothing."""
    return float(values.mean()) if values.size else None


def deciles(content: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """The tenth in which a region's mean rank lies: equal contents are never parted."""
    return ((ranks(content) + 0.5) * 10 // len(content)).astype(int)


def groups_by(regions: Regions, number: Int[np.ndarray, " R"]) -> tuple[Group, ...]:
    """The regions of each number that occurs, in rising order."""
    groups = []
    for one in np.unique(number).tolist():
        content, tokens = regions.content[number == one], regions.tokens[number == one]
        groups.append(
            Group(
                low=int(content.min()), high=int(content.max()), n=len(content),
                share=float((tokens == regions.finest).mean()), mean_tokens=float(tokens.mean()),
            )
        )  # fmt: skip
    return tuple(groups)
