"""Greedy answers of a trained run, with any method in place, scored and timed.

Several processes each answer the rows of a batch that their devices hold; what they said is
gathered once, at the end, and every process then has the whole result.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int
from transformers import PreTrainedTokenizerFast

from focus_jax.checkpoint import Checkpoints, load_params
from focus_jax.compress.method import Method
from focus_jax.compress.plan import Plan, plan
from focus_jax.data.loader import Gold, Loader
from focus_jax.data.sources import Record, Source
from focus_jax.evaluate.metrics import by_kind, exact_match
from focus_jax.experiment import Experiment
from focus_jax.generate import Generator, texts
from focus_jax.methods import parse_method
from focus_jax.models.lora import merged, without_lora
from focus_jax.models.params import initialise, with_method
from focus_jax.models.vlm import VLM, dims_of, sizes_of
from focus_jax.objectives import inputs_of
from focus_jax.sampling import Sampling
from focus_jax.sharding import Layout, describe, make_layout, put_batch
from focus_jax.training import for_device
from focus_jax.workdir import data_source, make_eval_loader, read_workdir, write_text

InitSamplers = Literal["", "random"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """One question with what the model said."""

    index: int
    question_number: int
    question: str
    gold: str
    prediction: str
    kind: str
    correct: bool


@dataclass(frozen=True)
class Result:
    """A method's score on a split, and what it cost.

    Accuracy is exact match with Wilson's 95 % interval, shares of 1; `by_kind` holds the same for
    each kind of question. Slots and `flops` (one question's prefill) are the plan's.
    `seconds_per_sample`: prefill and greedy decoding, the median over batches once compiled.
    `unreadable` counts questions left out because their image is corrupt.
    """

    checkpoint: str
    step: int
    method: str
    split: str
    data_seed: int | None
    images: int
    unreadable: int
    accuracy: float
    low: float
    high: float
    n: int
    by_kind: dict[str, dict[str, float]]
    visual_slots_entering: int
    visual_slots_mean: float
    share_of_full: float
    flops: float
    seconds_per_sample: float
    batch: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts."""
        return asdict(self)


@dataclass(frozen=True)
class Trained:
    """A run read back: its config, tokenizer, canonical parameters, and the step they are from.

    `layout`: where the parameters lie; None: all on one device.
    """

    workdir: Path
    config: Experiment
    tokenizer: PreTrainedTokenizerFast
    tree: dict[str, jax.Array]
    step: int
    layout: Layout | None = None

    def method(self, text: str | None) -> Method:
        """The method that `text` names; without it, the one that the run trained with."""
        return parse_method(text, self.config.compress) if text else self.config.compress.value()

    def model(
        self, method: Method, init_samplers: InitSamplers = "", layout: Layout | None = None
    ) -> VLM:
        """The run's model with any method, as `layout` says or on one device.

        ValueError for a learned method without weights.
        """
        cfg = self.config
        fresh = lambda: initialise(cfg.model, method, cfg.train.seed, layout)  # noqa: E731
        return with_method(cfg.model, self.tree, method, fresh if init_samplers else None, layout)

    def plan(self, method: Method) -> Plan:
        """What a question's prefill costs with this method."""
        model, data = self.config.model, self.config.data
        return plan(
            method, dims_of(model, self.config.tiles), sizes_of(model), data.text_length,
            prefix_tokens=data.prefix_length, head_tokens=1,
        )  # fmt: skip


def read_run(workdir: str | Path, layout: Layout | None = None) -> Trained:
    """A run's newest checkpoint with its config; each device reads its own part of `layout`.

    Low-rank updates are added to their kernels, and the config has none.
    FileNotFoundError says what is missing.
    """
    config, tokenizer = read_workdir(workdir)
    folder = Path(workdir) / "checkpoints"
    tree, _ = load_params(folder, place=None if layout is None else layout.stored)
    with Checkpoints(folder, keep=1) as checkpoints:
        step = checkpoints.latest()
    tree = merged(tree, config.model.lora)
    config = replace(config, model=without_lora(config.model))
    return Trained(Path(workdir), config, tokenizer, tree, step or 0, layout)


def evaluate(
    run: str | Path | Trained,
    method: str | None = None,
    split: str | None = None,
    data_seed: int | None = None,
    limit: int = 0,
    batch: int = 0,
    out: str | Path | None = None,
    init_samplers: InitSamplers = "",
    progress: Progress | None = None,
) -> Result:
    """Answer a split's questions greedily, one a sample, and score them by exact match.

    `run` is a workdir, or what `read_run` made of it; where that has no layout, every device holds
    the whole model. All processes of a job call this, and get the same result. `method`, `split`,
    `limit` (the first images alone, 0: all) and `batch` (questions) are the run's own unless given.
    `data_seed` draws images anew instead of the stored ones. `out`: every answer as a line of JSON,
    written by process 0. `progress(done, total)` is called after each batch.
    Raises FileNotFoundError where there is no run, ValueError for what does not fit it.
    """
    run = run if isinstance(run, Trained) else read_run(run, make_layout())
    layout = run.layout or make_layout()
    chosen, split = run.method(method), split or run.config.eval.split
    limit, batch = limit or run.config.eval.limit, batch or run.config.eval.batch
    if limit < 0 or batch < 1:
        raise ValueError(f"limit={limit}, batch={batch}: give at least 0 images, 1 question")
    check_batch(batch, layout)
    cfg = replace(run.config, eval=replace(run.config.eval, batch=batch))
    cost = run.plan(chosen)
    model = run.model(chosen, init_samplers, layout)
    source = first_images(data_source(cfg, split, data_seed), limit)
    loader = make_eval_loader(cfg, source, run.tokenizer, layout)
    answers, seconds = answer_all(model, cfg, run.tokenizer, loader, layout, progress)
    if not answers:
        raise ValueError(f"no image of {split!r} can be read ({len(source)} tried): mend the data")
    if out is not None and jax.process_index() == 0:
        write_answers(Path(out), answers)
    kinds = by_kind([a.kind for a in answers], [a.correct for a in answers])
    everything = kinds.pop("all")
    return Result(
        checkpoint=str(run.workdir),
        step=run.step,
        method=method or chosen.name,
        split=split,
        data_seed=data_seed,
        images=len(source),
        unreadable=len(source) * len(source[0]["question"]) - len(answers),
        accuracy=everything["accuracy"],
        low=everything["low"],
        high=everything["high"],
        n=int(everything["n"]),
        by_kind=kinds,
        visual_slots_entering=cost.entering,
        visual_slots_mean=cost.mean_slots,
        share_of_full=cost.mean_share,
        flops=cost.flops.total,
        seconds_per_sample=seconds,
        batch=batch,
        device=f"{jax.devices()[0].device_kind} x {layout.mesh.size}",
    )


def check_batch(batch: int, layout: Layout) -> None:
    """ValueError unless so many questions divide over the devices that hold samples."""
    ways = layout.ways("batch")
    if batch % ways:
        raise ValueError(
            f"a batch of {batch} questions does not divide over {ways} devices "
            f"({describe(layout.mesh)}): give a multiple of {ways} (--batch) or another mesh "
            "(--mesh)"
        )


class FirstImages:
    """The first images of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._count:
            raise IndexError(f"index {index} is outside the first {self._count} images")
        return self._source[index]


def first_images(source: Source, limit: int) -> Source:
    """The first `limit` images, all of them for 0 or where there are no more."""
    return FirstImages(source, min(limit, len(source))) if limit else source


# Columns of what processes tell each other; behind them the answer's tokens.
PLACE, INDEX, QUESTION, VALID = range(4)
COLUMNS = 4


def answer_all(
    model: VLM,
    cfg: Experiment,
    tokenizer: PreTrainedTokenizerFast,
    loader: Loader,
    layout: Layout,
    progress: Progress | None = None,
) -> tuple[list[Answer], float]:
    """Answers to all questions of a flat loader, and the median seconds of one.

    The loader makes this process's rows; the answers are those of all processes, in order.
    ValueError when a right answer would not fit the new tokens.
    """
    new = cfg.eval.max_new_tokens
    generate = Generator(model, Sampling(new, stop=(int(tokenizer.eos_token_id),)))
    # On every device, and so the same for all processes.
    fold = jax.jit(jax.random.fold_in, out_shardings=layout.sharding())
    by_sample = jax.jit(lambda tokens: tokens, out_shardings=layout.sharding("batch"))
    held = np.array(layout.rows(cfg.eval.batch))
    parts: list[np.ndarray] = []
    times, total = [], loader.steps_per_epoch
    batches = iter(loader)
    for number, batch in enumerate(batches):
        check_room(loader.gold(batch), tokenizer, new)
        inputs = inputs_of(put_batch(for_device(batch), layout))
        key = fold(jax.random.key(cfg.train.seed), np.uint32(number))
        if number == 0:  # once more than the others, so that compilation is not timed
            jax.block_until_ready(generate(inputs, key))
        jax.block_until_ready((inputs, key))
        start = time.perf_counter()
        tokens = jax.block_until_ready(generate(inputs, key))
        times.append((time.perf_counter() - start) / len(tokens))
        place = number * cfg.eval.batch + held
        about = (place, batch["index"], batch["question"][:, 0], batch["row_valid"][:, 0])
        parts.append(np.column_stack([*about, own_rows(by_sample(tokens))]).astype(np.int32))
        if progress is not None:
            progress(number + 1, total)
    batches.close()
    said = everyones(np.concatenate(parts))
    return list(answers_of(said, loader, tokenizer)), float(np.median(times))


def own_rows(x: Array) -> np.ndarray:
    """The rows of an array split over its first axis that this process holds."""
    parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])


def everyones(rows: Int[np.ndarray, "R C"]) -> Int[np.ndarray, "S C"]:
    """The rows of all processes, each once, in the order of their places."""
    rows = multihost_utils.process_allgather(rows, tiled=True)
    # Processes that share a tensor axis hold the same rows.
    return rows[np.unique(rows[:, PLACE], return_index=True)[1]]


def check_room(
    golds: Sequence[Sequence[Gold | None]], tokenizer: PreTrainedTokenizerFast, new: int
) -> None:
    """ValueError when a right answer has more tokens than are generated."""
    for gold in (gold for row in golds for gold in row if gold is not None):
        needed = len(tokenizer(gold.answer, add_special_tokens=False)["input_ids"])
        if needed > new:
            raise ValueError(
                f"the answer {gold.answer!r} has {needed} tokens, and the run generates {new}: set "
                "eval.max_new_tokens in its config"
            )


def answers_of(
    said: Int[np.ndarray, "S C"], loader: Loader, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Answer]:
    """Rows of numbers as scored answers, padding and corrupt images left out."""
    said = said[said[:, VALID] == 1]
    batch = {
        "index": said[:, INDEX], "question": said[:, [QUESTION]],
        "row_valid": said[:, [VALID]] == 1,
    }  # fmt: skip
    predictions = texts(tokenizer, said[:, COLUMNS:])
    for row, [gold], prediction in zip(said, loader.gold(batch), predictions, strict=True):
        assert gold is not None
        yield Answer(
            index=int(row[INDEX]),
            question_number=int(row[QUESTION]),
            question=gold.question,
            gold=gold.answer,
            prediction=prediction,
            kind=gold.kind,
            correct=exact_match(prediction, gold.answer),
        )


def write_answers(path: Path, answers: list[Answer]) -> None:
    """One JSON object a line, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
