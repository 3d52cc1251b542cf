"""`python -m focus_jax calibrate vtw|yopo`: a method's knobs, measured on prompts.

`vtw`: the layer at which visual tokens may leave. `yopo`: the heads that look at them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from focus_jax import calibration
from focus_jax.calibration import Batch, HeadChoice
from focus_jax.charts import divergence_plot, head_picture
from focus_jax.cli.arguments import Meter, Parser, argv_or, not_negative, positive
from focus_jax.cli.common import friendly
from focus_jax.compress.yopo import save_head_mask
from focus_jax.data.images import CorruptImage
from focus_jax.data.loader import make_loader
from focus_jax.evaluate.runner import Trained, first_images, read_run
from focus_jax.evaluate.study import write_json
from focus_jax.experiment import usual_samplers
from focus_jax.methods import parse_method
from focus_jax.models.vlm import VLM
from focus_jax.objectives import inputs_of
from focus_jax.pipeline import Pipeline, load
from focus_jax.prompts import check_context, make_inputs
from focus_jax.report import markdown_table
from focus_jax.training import for_device
from focus_jax.workdir import TEMPLATES, data_source, loader_config

SAMPLES = {"vtw": 20, "yopo": 100}  # as officially
EXAMPLE = '{"image": "photo.jpg", "question": "What is it?"}'


class Samples(NamedTuple):
    """A model and `used` prompts for it, in batches; `available` is how many there are."""

    vlm: VLM
    batches: Iterator[Batch]
    used: int
    available: int


class Asked(NamedTuple):
    """One line of a file of samples."""

    place: str
    image: Path
    question: str


# -------------------------------------------------------------------------------- commands


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exit 0 with the settings to use, 1 where none qualifies."""
    given = argv_or(argv)
    what = chooser().parse_args(given[:1]).what
    flags = parser(what).parse_args(given[1:])
    flags.out.mkdir(parents=True, exist_ok=True)
    samples = samples_of(flags, SAMPLES[what])
    told = f"{samples.used} of {samples.available} samples, method {flags.method}"
    print(f"{flags.checkpoint}: {told}", file=sys.stderr)
    return (vtw if what == "vtw" else yopo)(flags, samples)


def vtw(flags: Any, samples: Samples) -> int:
    """The first layer before which withdrawal changes the next token by no more than `eta`."""
    depth = samples.vlm.cfg.decoder.layers
    first = calibration.usual_first(depth) if flags.first is None else flags.first
    calibration.check_first(first, depth)
    if flags.first is None and first < calibration.OFFICIAL_FIRST:
        print(f"a decoder of {depth} layers: searching from layer {first}", file=sys.stderr)
    search = partial(calibration.withdrawal_curve, first=first)
    kl = np.asarray(measured(flags, samples, search).kl, np.float64)
    layers, mean = range(first, depth), kl.mean(0)
    layer = calibration.first_within(mean, first, flags.eta)
    use = None if layer is None else joined(flags.method, f"vtw:layer={layer}")
    rows = [
        {"layer": at, "kl": mean[i], "most": kl[:, i].max(), "slots": at / depth,
         "mark": "<- the first within eta" if at == layer else ""}
        for i, at in enumerate(layers)
    ]  # fmt: skip
    columns = [
        ("layer", "leave before layer", "d"), ("kl", "mean KL (nats)", ".3g"),
        ("most", "highest", ".3g"), ("slots", "visual slots left", ".0%"), ("mark", "", ""),
    ]  # fmt: skip
    print(markdown_table(rows, columns))
    value = described(flags, samples) | {
        "eta": flags.eta, "first": first, "layers": list(layers), "mean_kl": mean.tolist(),
        "kl": kl.tolist(), "layer": layer, "use": use,
    }  # fmt: skip
    write_json(flags.out / "vtw.json", value)
    divergence_plot(flags.out / "vtw.png", layers, kl, flags.eta, layer)
    print(f"wrote {flags.out / 'vtw.json'}, {flags.out / 'vtw.png'}")
    if layer is None:
        best = int(mean.argmin())
        print(
            f"no layer of {first}..{depth - 1} has a mean KL of at most {flags.eta:g}: the least "
            f"is {mean[best]:.3g} before layer {layers[best]}. This model needs its visual tokens "
            "to the end, or give a higher --eta",
            file=sys.stderr,
        )
        return 1
    print(f"use --method {use}")
    return 0


def yopo(flags: Any, samples: Samples) -> int:
    """A mask of the heads that attend to visual tokens."""
    cfg = samples.vlm.cfg.decoder
    if flags.heads is not None and not 0 < flags.heads <= cfg.heads:
        raise ValueError(f"--heads {flags.heads:g}: the decoder has {cfg.heads} a layer")
    keep = flags.keep if flags.heads is None else flags.heads / cfg.heads
    choose = partial(
        calibration.choose_heads, threshold=flags.threshold, keep=keep, share=flags.share,
        whole=flags.whole, layers=flags.layers,
    )  # fmt: skip
    choose(np.zeros((1, cfg.layers, cfg.heads)))  # what does not fit is told before the work
    seen = measured(flags, samples, calibration.head_attention)
    found = choose(calibration.ratios(seen, cfg.kv_heads))
    path = flags.out / "heads.npy"
    use = joined(flags.method, f"yopo:layers={flags.layers or 'none'},heads={path}")
    print(heads_table(found))
    value = described(flags, samples) | {
        "threshold": found.threshold, "share": flags.share, "whole": flags.whole,
        "layers": flags.layers, "kept": found.mask.sum(-1).tolist(),
        "importance": found.importance.tolist(), "above": found.above.tolist(),
        "mask": path.name, "use": use,
    }  # fmt: skip
    save_head_mask(path, found.mask)
    write_json(flags.out / "yopo.json", value)
    head_picture(flags.out / "yopo.png", found.importance, found.mask)
    print(f"wrote {path}, {flags.out / 'yopo.json'}, {flags.out / 'yopo.png'}")
    chosen = found.mask[flags.whole : flags.layers]
    print(
        f"above {found.threshold:.4g} in more than {flags.share:.0%} of the samples: "
        f"{chosen.sum(-1).mean():.1f} of {cfg.heads} heads a layer"
    )
    print(f"use --method {use}")
    return 0


def heads_table(found: HeadChoice) -> str:
    """Kept heads by layer, and the range of their importance."""
    rows = [
        {"layer": i, "kept": int(mask.sum()), "low": row.min(), "mean": row.mean(),
         "high": row.max()}
        for i, (mask, row) in enumerate(zip(found.mask, found.importance, strict=True))
    ]  # fmt: skip
    columns = [("layer", "layer", "d"), ("kept", "heads kept", "d")]
    columns += [(name, f"{name} image/text", ".3g") for name in ("low", "mean", "high")]
    return markdown_table(rows, columns)


def measured(flags: Any, samples: Samples, what: Any) -> Any:
    """What `what` measures on all samples, with progress on stderr."""
    meter, done = Meter("calibrate"), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        meter(done, samples.used)

    return calibration.over_samples(what, samples.vlm, samples.batches, flags.seed, progress)


def joined(base: str, method: str) -> str:
    """A method behind the one that stood while it was calibrated."""
    return method if base == "full" else f"{base}+{method}"


def described(flags: Any, samples: Samples) -> dict[str, Any]:
    """What was measured on, for the JSON."""
    return {
        "checkpoint": str(flags.checkpoint), "base": flags.method, "samples": samples.used,
        "file": flags.samples, "seed": flags.seed,
    }  # fmt: skip


# ----------------------------------------------------------------------------------- flags


def chooser() -> Parser:
    """The command line up to the method's name."""
    out = Parser(
        "python -m focus_jax calibrate",
        usage="python -m focus_jax calibrate vtw|yopo [flags]",
        description="Measure the knobs of a method on a checkpoint; each has its own --help.",
    )
    out.add_argument("what", choices=tuple(SAMPLES), help="a layer to withdraw at, or a head mask")
    return out


def parser(what: str) -> Parser:
    """The flags of one method."""
    layers = "Find the layer before which all visual tokens may leave (VTW)."
    heads = "Find the heads that attend to visual tokens (YOPO)."
    out = Parser(
        f"python -m focus_jax calibrate {what}", description=layers if what == "vtw" else heads
    )
    out.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run of train.py, or Hugging Face's"
    )
    out.add_argument(
        "--samples", metavar="N|FILE", help="of a run: questions of its training split, one an "
        f"image; else a file with lines {EXAMPLE}, paths from its own folder",
    )  # fmt: skip
    out.add_argument(
        "--limit", type=positive, metavar="N", help=f"samples at most (default {SAMPLES[what]})"
    )
    (withdrawal_flags if what == "vtw" else head_flags)(out)
    out.add_argument(
        "--method", default="full", metavar="M", help="in place meanwhile, without cuts"
    )
    out.add_argument(
        "--out", type=Path, default=Path("runs/calibrate"), metavar="DIR",
        help="for numbers and pictures (default runs/calibrate)",
    )  # fmt: skip
    out.add_argument("--batch", type=positive, default=4, metavar="N", help="samples at a time")
    out.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of random methods")
    out.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU")
    out.add_argument("--vision-tower", metavar="DIR", help="for checkpoints in LLaVA's own layout")
    out.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint lacks its own")
    return out


def withdrawal_flags(out: Parser) -> None:
    """Flags of the search for a layer."""
    known = ", ".join(f"{eta:g} {name}" for name, eta in calibration.PUBLISHED_ETA.items())
    out.add_argument(
        "--eta", type=above_zero, default=0.003, metavar="KL",
        help=f"the mean divergence that may be, in nats (default 0.003; published: {known})",
    )  # fmt: skip
    out.add_argument(
        "--first", type=not_negative, metavar="K",
        help="the first layer tried (default: 5, as officially; a quarter of the layers where that "
        "is less)",
    )  # fmt: skip


def above_zero(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def head_flags(out: Parser) -> None:
    """Flags of the choice of heads."""
    number = out.add_mutually_exclusive_group(required=True)
    number.add_argument(
        "--threshold", type=float, metavar="R",
        help="attention to the image over attention to text above which a head stays "
        "(published for 13B: 0.2, 0.077, 0.035 for about 10, 20, 30 of 40 heads)",
    )  # fmt: skip
    number.add_argument(
        "--heads", type=float, metavar="N", help="or the threshold at which N a layer stay, on "
        "average over the layers chosen in",
    )  # fmt: skip
    number.add_argument("--keep", type=float, metavar="P", help="or a part of them, such as 0.5")
    out.add_argument(
        "--share", type=float, default=0.4, metavar="P",
        help="of the samples must be above it (default 0.4; it takes more than that)",
    )  # fmt: skip
    out.add_argument(
        "--whole", type=not_negative, default=2, metavar="N", help="first layers that keep all (2)"
    )
    out.add_argument(
        "--layers", type=positive, metavar="N",
        help="choose in the layers before N alone, where yopo:layers=N reads visual tokens",
    )  # fmt: skip


# --------------------------------------------------------------------------------- samples


def samples_of(flags: Any, usual: int) -> Samples:
    """A run's own questions, or those of a file for a Hugging Face checkpoint."""
    folder = Path(flags.checkpoint)
    if not any((folder / name).is_dir() for name in ("checkpoints", "tokenizer")):
        return file_samples(flags, usual)
    given = [name for name in ("dtype", "vision_tower", "tokenizer") if getattr(flags, name)]
    if given:
        flag = given[0].replace("_", "-")
        raise ValueError(f"--{flag}: {folder} is a run of train.py, which has its own")
    count = flags.samples or str(usual if flags.limit is None else flags.limit)
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(
            f"--samples {count}: {folder} is a run of train.py, whose own training questions are "
            "asked: give how many"
        )
    run = read_run(folder)
    vlm = run.model(run.method(flags.method))
    return run_samples(run, vlm, min(int(count), flags.limit or int(count)), flags.batch)


def run_samples(run: Trained, vlm: VLM, count: int, batch: int) -> Samples:
    """The first images of the training split with one question each, another from image to image.

    ValueError where one of the images is corrupt.
    """
    whole = data_source(run.config, "train")
    source = first_images(whole, count)
    sizes = loader_config(run.config, min(batch, len(source)), 1, 0)
    config = replace(sizes, shuffle=False, max_bad_share=0.0)
    loader = make_loader(source, run.tokenizer, TEMPLATES[run.config.data.template], config, False)

    def batches() -> Iterator[Batch]:
        for arrays in loader:
            pick = np.maximum(arrays["index"], 0)[:, None, None] % arrays["tokens"].shape[1]
            for name in ("tokens", "token_valid", "query_mask", "label_mask"):
                arrays[name] = np.take_along_axis(arrays[name], pick, axis=1)
            given = {name: jnp.asarray(array) for name, array in for_device(arrays).items()}
            yield inputs_of(given), int((arrays["index"] >= 0).sum())

    return Samples(vlm, batches(), len(source), len(whole))


def file_samples(flags: Any, usual: int) -> Samples:
    """A Hugging Face checkpoint with the prompts of a file."""
    if flags.samples is None or (flags.samples.isdecimal() and not Path(flags.samples).exists()):
        raise ValueError(
            f"{flags.checkpoint} holds no run of train.py, and a Hugging Face checkpoint has no "
            "questions of its own: name a run, or give --samples FILE.jsonl with "
            f"lines such as {EXAMPLE}"
        )
    asked = read_samples(Path(flags.samples))
    chosen = asked[: flags.limit or usual]
    vlm = load(
        flags.checkpoint, dtype=flags.dtype, vision_tower=flags.vision_tower,
        tokenizer=flags.tokenizer,
    )  # fmt: skip
    vlm = vlm.with_method(parse_method(flags.method, usual_samplers(vlm.vlm.cfg)))
    return Samples(vlm.vlm, prompt_batches(vlm, chosen, flags.batch), len(chosen), len(asked))


def read_samples(file: Path) -> list[Asked]:
    """The lines of a file of samples. FileNotFoundError, and ValueError naming the line."""
    if not file.is_file():
        raise FileNotFoundError(f"no samples at {file}: give a file with lines such as {EXAMPLE}")
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is no JSON ({error}): write {EXAMPLE}") from error
        value = value if isinstance(value, dict) else {}
        name, question = value.get("image"), value.get("question")
        if not all(isinstance(text, str) and text.strip() for text in (name, question)):
            raise ValueError(f"{place} lacks an image or a question: write {EXAMPLE}")
        image = file.parent / str(name)
        if not image.is_file():
            raise FileNotFoundError(f"{place}: no image at {image}; paths start at {file.parent}")
        out.append(Asked(place, image, str(question)))
    if not out:
        raise ValueError(f"{file} is empty: give lines such as {EXAMPLE}")
    return out


def prompt_batches(vlm: Pipeline, asked: Sequence[Asked], batch: int) -> Iterator[Batch]:
    """Prompts as a user would ask them; the last batch is filled up with its first sample."""
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        prompts = [vlm.encode(one.question, 1) for one in part]
        tiles = []
        for one in part:
            try:
                tiles += vlm.tiles([[one.image]])
            except CorruptImage as error:
                raise ValueError(f"{one.place}: {one.image} cannot be read ({error})") from error
        check_context(vlm.vlm.cfg, vlm.vlm.method, prompts, tiles, 1)
        fill = [i if i < len(part) else 0 for i in range(min(batch, len(asked)))]
        yield (
            make_inputs(vlm.vlm.cfg, [prompts[i] for i in fill], [tiles[i] for i in fill]),
            len(part),
        )


if __name__ == "__main__":
    sys.exit(main())
