"""The same checkpoint, prompt and photos here and in transformers, compared number by number."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from focus_jax import hf, hf_reference
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Context, VisualTokens
from focus_jax.config import DTypeName, ModelConfig
from focus_jax.data.conversation import IMAGE, Prompt, encode_prompt, place_images
from focus_jax.data.images import Tiles
from focus_jax.data.preprocess import ImageConfig, preprocess_many
from focus_jax.generate import Generator
from focus_jax.hf_reference import Reference
from focus_jax.models.streams import Streams
from focus_jax.models.vlm import VLM, Inputs
from focus_jax.parity_walk import Bars, Ours, first_mismatch, pixels_step, steps
from focus_jax.pipeline import Pipeline, load
from focus_jax.prompts import check_context, make_inputs
from focus_jax.sampling import Sampling


@dataclass(frozen=True)
class Tolerance:
    """How far the two may be apart.

    `logits`, `features`: greatest absolute difference. `mean_logits`: mean absolute difference, in
    standard deviations of the reference's; `rms_features`: root mean square of the difference, in
    that of the reference. `tokens`: whether greedy tokens must be equal. `modules`: to find the
    first that differs.
    """

    modules: Bars
    logits: float = np.inf
    features: float = np.inf
    mean_logits: float = np.inf
    rms_features: float = np.inf
    tokens: bool = True


# In bfloat16 two likely tokens a rounding apart may change places, and answers part from there.
TOLERANCES: dict[DTypeName, Tolerance] = {
    "float32": Tolerance(Bars(alone=2e-5, whole=1e-3), logits=2e-4, features=1e-4),
    "bfloat16": Tolerance(
        Bars(alone=0.1, whole=0.5), mean_logits=0.05, rms_features=0.05, tokens=False
    ),
}
TINY = 1e-30  # in the place of a spread of 0, as without images
NO_MODULE = "no single module"
PIXELS_APART = 1e-4  # in root mean squares of a tile, whatever the dtype


class Case(NamedTuple):
    """What both sides are asked: the text with all its markers, and how it reads here."""

    text: str
    prompt: Prompt
    tiles: list[Tiles]


@dataclass(frozen=True)
class Report:
    """Figures of a comparison; None where there is nothing to lay side by side.

    `greedy_tokens`: how many were compared; `greedy_parts_at`: the first that differs. On a
    mismatch `first_mismatch` is the first module that differs, as transformers names it.
    """

    max_abs_logit_diff: float | None
    mean_abs_logit_diff: float | None
    greedy_tokens: int
    greedy_parts_at: int | None
    features_max_abs_diff: float | None
    first_mismatch: str | None = None
    first_mismatch_max_abs_diff: float | None = None

    @property
    def equal(self) -> bool:
        return self.first_mismatch is None

    def to_json(self) -> dict[str, Any]:
        """What the command prints."""
        out: dict[str, Any] = {
            "max_abs_logit_diff": self.max_abs_logit_diff,
            "mean_abs_logit_diff": self.mean_abs_logit_diff,
            "greedy_tokens": self.greedy_tokens,
            "greedy_tokens_equal": self.greedy_parts_at is None,
            "features_max_abs_diff": self.features_max_abs_diff,
        }
        if self.greedy_parts_at is not None:
            out["greedy_parts_at"] = self.greedy_parts_at
        if not self.equal:
            out["first_mismatch"] = self.first_mismatch
            out["first_mismatch_max_abs_diff"] = self.first_mismatch_max_abs_diff
        return out


def compare(
    directory: str | Path,
    prompt: str,
    images: Sequence[str | Path] = (),
    *,
    new_tokens: int = 32,
    dtype: DTypeName = "float32",
    dump: str | Path | None = None,
    pipeline: Pipeline | None = None,
) -> Report:
    """Compare a Hugging Face checkpoint here, in `dtype`, with transformers in float32.

    prompt: taken literally; "<image>" and a line break stand in front for each image that it does
    not place. dump: a file for `write_dump`. pipeline: stands in for the checkpoint's own, with
    its dtype; its method must be `full()`.
    ValueError: nothing asked, more markers than images, a context too long, LLaVA's original
    layout, no torch. CorruptImage, FileNotFoundError: an image that is none, or not there.
    """
    directory = hf.resolve(directory)
    hf_reference.check_readable(directory)
    hf_reference.torch_or_raise()
    if pipeline is not None and pipeline.vlm.method != full():
        raise ValueError(
            f"the pipeline's method is {pipeline.vlm.method.name!r}, and transformers keeps all "
            "visual tokens: hand in pipeline.with_method(full())"
        )
    paths = [Path(image) for image in images]
    case, cfg = case_of(directory, prompt, paths, new_tokens, pipeline)
    # First, so that the two models need not fit into memory together.
    theirs = hf_reference.reference(directory, case.text, paths, new_tokens, cfg.vision.depth)
    if pipeline is None:
        pipeline = load(directory, dtype=dtype, images="hf", method=full())
    compute = pipeline.vlm.cfg.compute_dtype
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest" if compute == "float32" else "default"):
        inputs = make_inputs(cfg, [case.prompt], [case.tiles])
        ours = run(pipeline, inputs, hf.image_token(directory) or 0, new_tokens)
        if dump is not None:
            write_dump(Path(dump), ours)
        return judged(pipeline, case, ours, theirs, TOLERANCES[compute])


# ---------------------------------------------------------------------------- what is asked


def case_of(
    directory: Path, prompt: str, images: Sequence[Path], new_tokens: int, given: Pipeline | None
) -> tuple[Case, ModelConfig]:
    """The case, and the model's sizes; checked before any weights are read."""
    if not prompt.replace(IMAGE, "").strip():
        raise ValueError("the prompt is empty: ask something")
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise FileNotFoundError(f"no image at {missing[0]}")
    text = place_images(prompt, len(images))
    if given is None:
        cfg, settings = hf.read_config(directory), ImageConfig.from_hf(directory, mode="hf")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True
        )
    else:
        cfg, settings, tokenizer = given.vlm.cfg, given.images, given.tokenizer
    case = Case(text, encode_prompt(tokenizer, text), preprocess_many(images, settings))
    check_context(cfg, full(), [case.prompt], [case.tiles], new_tokens)
    return case, cfg


# ---------------------------------------------------------------------------- our side


@jax.jit
def whole_prompt(vlm: VLM, inputs: Inputs) -> tuple[VisualTokens, Streams, Streams]:
    """Visual tokens, what enters the decoder, and the logits of every row that left it."""
    ctx = Context(jax.random.key(0))
    visual, _ = vlm.see(inputs, ctx)
    entry = vlm.begin(inputs, visual)
    stages = range(len(vlm.decoder.stages))
    out = vlm.decode(entry, stages, entry.visual.shape[1], ctx).streams
    score = vlm.decoder.logits
    return visual, entry, out._replace(token=score(out.token), visual=score(out.visual))


def run(pipeline: Pipeline, inputs: Inputs, image_token: int, new_tokens: int) -> Ours:
    """The whole prompt at once, and a greedy answer."""
    visual, entry, out = jax.device_get(whole_prompt(pipeline.vlm, inputs))
    at_text, at_visual = places(out)
    ids = np.full(at_text.size + at_visual.size, image_token, np.int64)
    ids[at_text] = np.asarray(inputs.tokens)[out.token_valid]
    generate = Generator(pipeline.vlm, Sampling(new_tokens, stop=pipeline.stop))
    tokens = np.asarray(generate(inputs, jax.random.key(0)))[0]
    return Ours(
        ids=ids,
        visual=np.isin(np.arange(ids.size), at_visual),
        features=visual.features[visual.valid].astype(np.float32),
        merged=in_order(entry).astype(np.float32),
        logits=in_order(out),
        tokens=tokens[tokens >= 0],
    )


def places(s: Streams) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " V"]]:
    """Where text and visual rows stand in the merged sequence; together they fill it."""
    text = np.asarray(s.token_position[s.token_valid])
    visual = np.asarray(s.visual_position[s.visual_valid])
    every = np.sort(np.concatenate([text, visual]))
    if not np.array_equal(every, np.arange(every.size)):
        raise ValueError(f"the positions of {every.size} rows do not count from 0: {every}")
    return text, visual


def in_order(s: Streams) -> Float[np.ndarray, "S D"]:
    """Rows of both streams, on the host, as they stand in the merged sequence."""
    rows = np.concatenate([s.token[s.token_valid], s.visual[s.visual_valid]])
    return rows[np.argsort(np.concatenate(places(s)))]


def write_dump(file: Path, ours: Ours) -> None:
    """Keep our arrays as .npz, whole or not at all.

    `input_ids` [S] (each image's token as often as the image has rows), `logits` [S W] of every
    prompt position, `image_features` [V D], `greedy_tokens` [N].
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            np.savez(
                out, input_ids=ours.ids, logits=ours.logits, image_features=ours.features,
                greedy_tokens=ours.tokens,
            )  # fmt: skip
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- judgement


def judged(
    pipeline: Pipeline, case: Case, ours: Ours, theirs: Reference, limit: Tolerance
) -> Report:
    """The figures, and where the two part if they do."""
    count, parted = greedy(ours.tokens, theirs.tokens, pipeline.stop)
    logits, features = apart(ours.logits, theirs.logits), apart(ours.features, theirs.features)
    # Comparisons with NaN are False: each of these must hold, rather than none fail.
    held = (
        np.array_equal(ours.ids, theirs.ids)
        and logits.max() <= limit.logits
        and logits.mean() <= limit.mean_logits * max(theirs.logits.std(), TINY)
        and features.max(initial=0.0) <= limit.features
        and rms(features) <= limit.rms_features * max(rms(theirs.features), TINY)
    )
    module: str | None = None
    by: float | None = None
    if not held:
        module, by = where(pipeline, case, ours, theirs, limit.modules)
    elif parted is not None and limit.tokens:
        module = "generation"
    return Report(
        max_abs_logit_diff=figure(logits.max()),
        mean_abs_logit_diff=figure(logits.mean()),
        greedy_tokens=count,
        greedy_parts_at=parted,
        features_max_abs_diff=figure(features.max()) if features.size else None,
        first_mismatch=module,
        first_mismatch_max_abs_diff=by,
    )


def where(
    pipeline: Pipeline, case: Case, ours: Ours, theirs: Reference, bars: Bars
) -> tuple[str, float | None]:
    """The first module that differs, and by how much."""
    vlm = pipeline.vlm
    if case.tiles:
        pixels = pixels_step(vlm.cfg, case.tiles, theirs)
        if pixels.apart() > PIXELS_APART:
            return pixels.module, pixels.difference()
    if not np.array_equal(ours.ids, theirs.ids):
        return "input_ids", None
    step = first_mismatch(steps(vlm, case.tiles, ours, theirs), bars)
    return (NO_MODULE, None) if step is None else (step.module, step.difference())


def greedy(
    ours: Int[np.ndarray, " N"], theirs: Int[np.ndarray, " M"], stop: tuple[int, ...]
) -> tuple[int, int | None]:
    """How many tokens were compared, up to the first stop token, and the first that differs."""
    ends = np.flatnonzero(np.isin(theirs, stop))
    theirs = theirs[: ends[0] + 1] if ends.size else theirs
    compared, shared = max(ours.size, theirs.size), min(ours.size, theirs.size)
    differ = np.flatnonzero(ours[:shared] != theirs[:shared])
    if differ.size:
        return compared, int(differ[0])
    return compared, None if compared == shared else shared


def apart(ours: Float[np.ndarray, "A B"], theirs: Float[np.ndarray, "C B"]) -> np.ndarray:
    """Absolute differences; NaN alone where the shapes differ."""
    return np.abs(ours - theirs) if ours.shape == theirs.shape else np.full(1, np.nan)


def rms(x: Float[np.ndarray, "*S"]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def figure(value: float) -> float | None:
    """A number that JSON has."""
    return float(value) if np.isfinite(value) else None
