"""`python -m focus_jax plan`: what methods cost on a model, computed without running it.

With --topology: what a step takes on a slice of a pod, compiled without having it (plan_pod.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from focus_jax.cli import plan_pod
from focus_jax.cli.arguments import Parser, argv_or, positive
from focus_jax.cli.common import friendly, split_flags
from focus_jax.compress.plan import plan
from focus_jax.config import PRESETS, ModelConfig
from focus_jax.evaluate.study import write_json
from focus_jax.experiment import CompressConfig, load_program, override, usual_samplers
from focus_jax.methods import parse_method, split_methods
from focus_jax.models.vlm import dims_of, sizes_of


@dataclass(frozen=True)
class Subject:
    """What is planned for: a model, its samplers, and how much text stands by an image."""

    model: ModelConfig
    compress: CompressConfig
    text: int
    prefix: int


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Print one table for each method. Exit 0 when all of them fit the model."""
    given = argv_or(argv)
    flags, settings = split_flags(parser(), given)
    if settings and not flags.config:
        parser().parse_args(given)  # only a config has settings: this tells which flag is unknown
    if flags.markdown:
        return plan_pod.page(flags)
    plan_pod.check_flags(flags)
    if flags.topology:
        cfg = override(load_program(flags.config), settings, "focus_jax plan")
        return plan_pod.run(flags, cfg, given)
    subject = of_preset(flags.preset) if flags.preset else of_config(flags.config, settings)
    text = subject.text if flags.text is None else flags.text
    tiles = flags.tiles or subject.model.max_tiles
    if tiles > subject.model.max_tiles:
        raise ValueError(
            f"--tiles {tiles}: the model takes up to {subject.model.max_tiles}, thumbnail included"
        )
    dims, sizes = dims_of(subject.model, tiles), sizes_of(subject.model)
    names = split_methods(flags.method) if flags.method else []
    methods = [parse_method(name, subject.compress) for name in names]
    plans = [
        plan(
            method, dims, sizes, text, prefix_tokens=subject.prefix,
            questions=flags.questions or 1, head_tokens=1,
        )
        for method in methods or [subject.compress.value()]
    ]  # fmt: skip
    if flags.json:
        values = [one.to_json() for one in plans]
        write_json(flags.json, values[0] if len(values) == 1 else values)
    print("\n".join(one.table() for one in plans), end="")
    return 0


def parser() -> Parser:
    """The flags of this command; with --config all others set fields of the experiment."""
    out = Parser(
        "python -m focus_jax plan",
        description="Slots, operations and cache bytes of methods on a model; nothing is run.",
        epilog="With --config, other flags set fields of the experiment, as in train.py.",
    )
    of = out.add_mutually_exclusive_group(required=True)
    of.add_argument("--preset", choices=sorted(PRESETS), help="a model with official sizes")
    of.add_argument("--config", type=Path, metavar="FILE", help="a program in configs/")
    out.add_argument(
        "--method",
        metavar="M[,M]",
        help="e.g. full,focusllava:text.keep=0.2; default: the config's",
    )
    out.add_argument(
        "--tiles", type=positive, metavar="N", help="thumbnail included; default: most"
    )
    out.add_argument("--text", type=positive, metavar="N", help="tokens of a question")
    out.add_argument("--questions", type=positive, metavar="N", help="about one image")
    plan_pod.add_flags(out, of)
    out.add_argument("--json", type=Path, metavar="FILE", help="write the plans here")
    return out


def of_preset(name: str) -> Subject:
    """A preset with FocusLLaVA's usual samplers: text-guided in the decoder's middle."""
    model = PRESETS[name]()
    return Subject(model, usual_samplers(model), text=64, prefix=0)


def of_config(path: Path, settings: Sequence[str]) -> Subject:
    """A config program with fields set by flags."""
    cfg = override(load_program(path), settings, "focus_jax plan")
    return Subject(cfg.model, cfg.compress, cfg.data.text_length, cfg.data.prefix_length)


if __name__ == "__main__":
    sys.exit(main())
