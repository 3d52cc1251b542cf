"""`train.py`: a config program, flags over it, and a workdir that resumes by itself."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

import jax

from focus_jax.cli.arguments import argv_or
from focus_jax.cli.common import CODES, add_process_flags, friendly, joined, split_flags
from focus_jax.experiment import load_program, override, with_stages
from focus_jax.nans import naming_nans
from focus_jax.starting import with_checkpoint_model
from focus_jax.tracing import Steps, parse_steps
from focus_jax.training import Run
from focus_jax.watch import Watching


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on with training, in a workdir. Exit 0 when all stages are done, 75 when stopped
    by SIGTERM behind a checkpoint.
    """
    given = argv_or(argv)
    if wants_help(given):
        return 0
    known, flags = split_flags(parser(), given)
    nans = naming_nans() if known.debug_nans else nullcontext()
    with joined(known, preemptible=True), nans:
        watching = Watching(known.heartbeat, known.profile)
        config = override(load_program(known.config), flags, "train.py")
        if known.model_from_checkpoint:
            config = with_checkpoint_model(config)
        if known.stages:
            config = with_stages(config, known.stages.split(","))
        Run(config, known.workdir, known.quiet, watching).train()
        if jax.process_index() == 0:
            print(f"trained {config.name}: {config.train.steps} steps in {known.workdir}")
    return 0


def wants_help(given: Sequence[str]) -> bool:
    """Print the program's own flags if asked; those of the experiment follow where it is named."""
    asked = bool({"-h", "--help"} & set(given))
    if asked:
        parser().print_help()
    return asked and not any(flag.partition("=")[0] == "--config" for flag in given)


def parser() -> argparse.ArgumentParser:
    """The flags of the program itself; all others set fields of the experiment."""
    out = argparse.ArgumentParser(
        "train.py", add_help=False, allow_abbrev=False, epilog=CODES,
        usage="train.py --config FILE --workdir DIR [flags] [flags of the experiment]",
    )  # fmt: skip
    out.add_argument("--config", required=True, help="a program in configs/")
    out.add_argument("--workdir", required=True, help="where the run lives; resumes if it exists")
    out.add_argument(
        "--stages", metavar="NAME[,NAME]", help="only these of the config's stages; default: all"
    )
    out.add_argument(
        "--model-from-checkpoint", action="store_true",
        help="the model's sizes are those of what --train.init-from names",
    )  # fmt: skip
    out.add_argument("--quiet", action="store_true", help="no progress bar, no heartbeat line")
    out.add_argument(
        "--heartbeat", type=float, default=Watching().heartbeat, metavar="SECONDS",
        help="a sign of life that often, on stderr and in heartbeat.json; 0: none",
    )  # fmt: skip
    out.add_argument(
        "--profile", type=steps, metavar="FIRST:LAST",
        help="trace these steps, both included, into the workdir's profile/",
    )  # fmt: skip
    out.add_argument(
        "--debug-nans", action="store_true", help="name the operation that makes a NaN; slow"
    )
    add_process_flags(out)
    return out


def steps(text: str) -> Steps:
    """`10:15` as steps of a run."""
    try:
        return parse_steps(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
