"""`python -m focus_jax COMMAND`: the commands beside train.py and eval.py."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

# Each is a module of focus_jax.cli with a `main`; imported when asked for, so that help is quick.
COMMANDS = {
    "bench": "speed and memory beside transformers, and of every method",
    "calibrate": "the layer at which visual tokens may go, the heads that need them; from samples",
    "chat": "ask a checkpoint about photos; answers are streamed",
    "compare": "every method on one checkpoint at equal mean tokens, with intervals",
    "data": "a data set from LLaVA's JSON and images: build it, check it",
    "demo": "train the embedded job, compare all methods, write tables and pictures",
    "export": "a trained run as a directory that transformers loads",
    "golden": "our code on recorded outputs of official code, array by array",
    "grid": "train and evaluate every combination of configs, settings and methods",
    "launch": "train.py or eval.py as several processes on this machine",
    "parity": "compare a checkpoint here with transformers, number by number",
    "plan": "what a method costs on a model: slots, operations, cache bytes; runs nothing",
    "reproduce": "a paper's table again: published figures beside measured ones",
    "show": "a picture of what the samplers kept for questions on one image",
    "study": "what each part of FocusLLaVA brings, beside controls that could refute it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit 2 where there is none of that name."""
    given = list(sys.argv[1:] if argv is None else argv)
    flags = parser().parse_args(given[:1])
    return import_module(f"focus_jax.cli.{flags.command}").main(given[1:])


def parser() -> argparse.ArgumentParser:
    """The command line up to the command's name."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    lines.append("each has its own --help; to train and to score a run: train.py, eval.py")
    out = argparse.ArgumentParser(
        "focus_jax",
        usage="python -m focus_jax COMMAND [flags]",
        description="Visual-token compression in multimodal LLMs.",
        epilog="commands:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("command", type=known, help="one of those below", metavar="COMMAND")
    return out


def known(name: str) -> str:
    """The name of a command; argparse shows the error with exit code 2."""
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=2)
        mend = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(COMMANDS)}"
        raise argparse.ArgumentTypeError(f"unknown command {name!r}: {mend}")
    return name


if __name__ == "__main__":
    sys.exit(main())
