"""`train.py`: a config program, flags over it, and a workdir that resumes by itself."""

import argparse
import sys
from collections.abc import Sequence

from focus_jax.cli.common import friendly, split_flags
from focus_jax.experiment import load_program, override
from focus_jax.training import Run


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on with training, in a workdir. Exit 0 when all stages are done."""
    known, flags = split_flags(parser(), sys.argv[1:] if argv is None else argv)
    config = override(load_program(known.config), flags, "train.py")
    run = Run(config, known.workdir, quiet=known.quiet)
    run.train()
    print(f"trained {config.name}: {config.train.steps} steps in {known.workdir}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags of the program itself; all others set fields of the experiment."""
    out = argparse.ArgumentParser("train.py", add_help=False, allow_abbrev=False)
    out.add_argument("--config", required=True, help="a program in configs/")
    out.add_argument("--workdir", required=True, help="where the run lives; resumes if it exists")
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    return out
