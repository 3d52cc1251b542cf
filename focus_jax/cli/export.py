"""`python -m focus_jax export`: a trained run, or its decoder, for transformers to load."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from focus_jax import hf, hf_decoder
from focus_jax.cli.arguments import Parser, argv_or
from focus_jax.cli.common import friendly
from focus_jax.evaluate.runner import Trained, read_run
from focus_jax.methods import method_to_json
from focus_jax.models import params as names
from focus_jax.pipeline import with_image_token


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Write a run's newest checkpoint. Exit 0 when the directory is whole."""
    flags = parser().parse_args(argv_or(argv))
    if flags.part == "decoder":
        check_decoder_flags(flags)
    run = read_run(flags.run)
    if flags.part == "decoder":
        hf_decoder.write(
            flags.directory, run.config.model, run.tree, run.tokenizer, dtype=flags.dtype,
            overwrite=flags.overwrite,
        )  # fmt: skip
    else:
        export(run, flags.directory, flags.method, flags.source, flags.dtype, flags.overwrite)
    what = "the decoder of step" if flags.part == "decoder" else "step"
    print(f"wrote {what} {run.step} of {flags.run} to {flags.directory}")
    return 0


def check_decoder_flags(flags: Namespace) -> None:
    """ValueError for what concerns a method or a processor, which a decoder alone has not."""
    for name in ("method", "source"):
        if getattr(flags, name) is not None:
            raise ValueError(
                f"--{name} goes with a whole model: --part decoder writes the decoder and its "
                f"tokenizer alone; leave --{name} or --part out"
            )


def export(
    run: Trained,
    directory: Path,
    method: str | None = None,
    source: Path | None = None,
    dtype: hf.DTypeOut | None = None,
    overwrite: bool = False,
) -> None:
    """Write a run's model, tokenizer and processor, with a method and its learned parts beside.

    method: None is the run's own. source: a checkpoint whose processor and generation settings
    are taken along. Errors as in `hf.export`; ValueError: a learned method without weights.
    """
    chosen = run.method(method)
    wanted = names.canonical(names.named_leaves(names.abstract(run.config.model, chosen)))
    tree = {name: leaf for name, leaf in run.tree.items() if not names.is_sampler(name)}
    tree |= names.samplers_of(run.tree, wanted, chosen, None)
    cfg, tree, tokenizer, image = with_image_token(run.config.model, tree, run.tokenizer)
    hf.export(
        directory, cfg, tree, method_to_json(chosen), source=source, image_token=image,
        dtype=dtype, overwrite=overwrite,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax export",
        description=(
            "Write a run of train.py as a Hugging Face LLaVA directory: low-rank updates are added "
            "to their kernels, and the method with its learned parts stands beside, where "
            "focus_jax.load finds it and transformers does not look. --part decoder writes a "
            "text-only Llama with the run's tokenizer, which train.init_from=decoder=DIR reads."
        ),
        epilog=(
            "A tower with convolutions or without a class token has no place in transformers' "
            "LLaVA and is refused. JAX_PLATFORMS=cpu reads the run into the host's memory."
        ),
    )
    out.add_argument("run", type=Path, metavar="RUN", help="a workdir of train.py")
    out.add_argument("directory", type=Path, metavar="DIR", help="the directory to make")
    out.add_argument(
        "--part", choices=("all", "decoder"), default="all",
        help="all: a LLaVA with its method; decoder: a text-only Llama; default: all",
    )  # fmt: skip
    out.add_argument("--method", metavar="M", help="e.g. prumerge:ratio=0.25; default: the run's")
    out.add_argument(
        "--source", type=Path, metavar="DIR",
        help="a checkpoint whose processor and generation settings are taken along",
    )  # fmt: skip
    out.add_argument("--dtype", choices=sorted(hf.DTYPES), help="default: the parameters' own")
    out.add_argument("--overwrite", action="store_true", help="replace a directory that is there")
    return out
