"""`python -m focus_jax show`: what the samplers kept for questions on one image, as a picture."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from focus_jax.cli.arguments import Parser, argv_or, not_negative, whole_numbers
from focus_jax.cli.common import friendly
from focus_jax.compress.method import Context
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.data.cells import at_cells, first_tile, tiles_alone
from focus_jax.data.glyph_config import SPLITS
from focus_jax.data.images import decode
from focus_jax.data.loader import Gold
from focus_jax.data.sources import Record, Source
from focus_jax.evaluate.runner import InitSamplers, Trained, read_run
from focus_jax.generate import Generator, texts
from focus_jax.models.vlm import VLM, Inputs, Output
from focus_jax.objectives import inputs_of
from focus_jax.report import SamplerView, sampler_figure
from focus_jax.sampling import Sampling
from focus_jax.training import for_device
from focus_jax.workdir import data_source, make_eval_loader


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Draw one image's questions. Exit 0 when the picture is written."""
    flags = parser().parse_args(argv_or(argv))
    run = read_run(flags.checkpoint)
    split = flags.split or run.config.eval.split
    views = draw(
        run, flags.method, split, flags.image, flags.questions, flags.out, flags.data_seed,
        flags.init_samplers,
    )  # fmt: skip
    for view in views:
        print(f"{view.question}? {view.prediction} ({view.answer}): {len(view.kept)} tokens kept")
    print(f"wrote {flags.out}")
    return 0


def parser() -> Parser:
    """The flags of this command."""
    out = Parser("python -m focus_jax show", description="Draw what the samplers kept.")
    out.add_argument("--checkpoint", required=True, metavar="WORKDIR", help="a run of train.py")
    out.add_argument("--image", type=not_negative, default=0, metavar="INDEX", help="of the split")
    out.add_argument("--questions", type=whole_numbers, default=(0, 1), help="numbers, such as 0,3")
    out.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    out.add_argument("--method", metavar="M", help="default: the run's own")
    out.add_argument("--split", choices=SPLITS, help="default: the run's eval.split")
    out.add_argument("--data-seed", type=not_negative, metavar="N", help="images made anew")
    out.add_argument("--init-samplers", choices=("random",), default="", help="fresh weights")
    return out


class Asked:
    """One image of a source with some of its questions."""

    def __init__(self, source: Source, index: int, questions: Sequence[int]):
        if not 0 <= index < len(source):
            raise ValueError(f"image {index} is outside the split: give 0..{len(source) - 1}")
        self.record = source[index]
        found = len(self.record["question"])
        if wrong := [q for q in questions if not 0 <= q < found]:
            raise ValueError(f"question {wrong[0]} is not on image {index}: give 0..{found - 1}")
        self._chosen = list(questions)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        if index:
            raise IndexError(f"index {index} is outside a source of one image")
        pick = self._chosen
        record = dict(self.record)
        for name in ("question", "answer"):
            record[name] = tuple(self.record[name][i] for i in pick)  # type: ignore[literal-required]
        for name in ("kind", "hops"):
            record[name] = self.record[name][pick]  # type: ignore[literal-required]
        return Record(**record)  # type: ignore[typeddict-item]


def draw(
    run: Trained,
    method: str | None,
    split: str,
    index: int,
    questions: Sequence[int],
    path: Path,
    data_seed: int | None = None,
    init_samplers: InitSamplers = "",
) -> list[SamplerView]:
    """Write the picture; returns what it shows. ValueError: no such image or question."""
    source = Asked(data_source(run.config, split, data_seed), index, questions)
    model = run.model(run.method(method), init_samplers)
    cfg = replace(run.config, eval=replace(run.config.eval, batch=len(questions)))
    loader = make_eval_loader(cfg, source, run.tokenizer)
    batch = next(iter(loader))
    golds = [gold for row in loader.gold(batch) for gold in row if gold is not None]
    if len(golds) != len(questions):
        raise ValueError(f"image {index} of {split!r} is corrupt: choose another one")
    inputs = inputs_of({k: jnp.asarray(v) for k, v in for_device(batch).items()})
    views = look(run, model, inputs, golds)
    path.parent.mkdir(parents=True, exist_ok=True)
    sampler_figure(path, decode(source.record["image"]), views)
    return views


def look(run: Trained, model: VLM, inputs: Inputs, golds: Sequence[Gold]) -> list[SamplerView]:
    """One view for each question, from a pass that observes attention and from greedy answers."""
    key = jax.random.key(run.config.train.seed)
    observe = jax.jit(lambda vlm, given: vlm(given, Context(key), observe=True))
    out: Output = jax.device_get(observe(model, inputs))
    stop = (int(run.tokenizer.eos_token_id),)
    generate = Generator(model, Sampling(run.config.eval.max_new_tokens, stop=stop))
    said = texts(run.tokenizer, np.asarray(generate(inputs, key)))
    return [
        view(model, run.config.across, out, row, gold, prediction)
        for row, (gold, prediction) in enumerate(zip(golds, said, strict=True))
    ]


def view(
    model: VLM, across: int, out: Output, row: int, gold: Gold, prediction: str
) -> SamplerView:
    """What a picture needs of one question on an image of `across` x `across` tiles.

    Of the tiles alone, which show all of the image: a thumbnail would lie over them.
    """
    grid = (across * model.cfg.vision.grid,) * 2
    centre, side = np.asarray(out.visual.centre[row]), np.asarray(out.visual.side[row])
    own = np.asarray((out.visual.view[row] >= first_tile(across)) & ~out.visual.newline[row])
    layers = []
    for seen, slot in out.importance:
        place = present(np.asarray(slot[row]), np.asarray(out.visual.valid[row]))
        place = place[own[np.asarray(slot[row])[place]]]
        at = np.asarray(slot[row])[place]
        layers += [spread(grid, centre[at], side[at], w[place]) for w in np.asarray(seen[:, row])]
    kept = np.asarray(out.streams.slot[row])[np.asarray(out.streams.visual_valid[row])]
    kept = kept[own[kept]]
    region = region_of(model, grid)
    return SamplerView(
        question=gold.question,
        answer=gold.answer,
        prediction=prediction,
        grid=grid,
        region=(region, region),
        scale_map=scale_map(out, row, own, across, grid, region),
        kept=centre[kept] + 0.5,  # from the middle of the first patch to its corner
        kept_size=side[kept],
        importance=np.stack(layers),
        cut_layers=tuple(cut.layer for cut in model.method.cuts),
    )


def present(slot: Int[np.ndarray, " V"], valid: Bool[np.ndarray, " E"]) -> Int[np.ndarray, " K"]:
    """Where a stage's slots hold a token: they rise, and padding behind a cut says 0 again."""
    padding = (slot == 0) & (np.arange(len(slot)) > 0)
    return np.flatnonzero(valid[slot] & ~padding)


def spread(
    grid: tuple[int, int],
    centre: Float[np.ndarray, "K 2"],
    side: Float[np.ndarray, " K"],
    value: Float[np.ndarray, " K"],
) -> Float[np.ndarray, "rows cols"]:
    """Each token's value on the patches behind it; NaN where there is no token."""
    out = np.full(grid, np.nan)
    rows, cols = np.arange(grid[0]), np.arange(grid[1])
    for (row, col), size, v in zip(centre, side, value, strict=True):
        out[np.ix_(abs(rows - row) < size / 2, abs(cols - col) < size / 2)] = v
    return out


def region_of(model: VLM, grid: tuple[int, int]) -> int:
    """Side of a region in patches: the sampler's own, otherwise 4 where it fits."""
    vision = model.method.vision
    if isinstance(vision, VisionGuided):
        return vision.region
    return 4 if grid[0] % 4 == 0 and grid[1] % 4 == 0 else 1


def scale_map(
    out: Output,
    row: int,
    own: Bool[np.ndarray, " V"],
    across: int,
    grid: tuple[int, int],
    region: int,
) -> Int[np.ndarray, "Rr Rc"]:
    """Tokens of each region: what the sampler chose, otherwise counted from centres of `own`."""
    shape = (grid[0] // region, grid[1] // region)
    if (chosen := out.aux.maps.get("vision/tokens_per_region")) is not None:
        tiles = tiles_alone(np.asarray(chosen[row : row + 1]))
        return at_cells(tiles[..., None]).reshape(shape)
    valid = np.asarray(out.visual.valid[row]) & own
    at = ((np.asarray(out.visual.centre[row])[valid] + 0.5) // region).astype(int)
    counts = np.zeros(shape, int)
    np.add.at(counts, (at[:, 0], at[:, 1]), 1)
    return counts


if __name__ == "__main__":
    sys.exit(main())
