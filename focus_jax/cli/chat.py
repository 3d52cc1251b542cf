"""`python -m focus_jax chat`: ask a checkpoint about photos."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from focus_jax.chat import Chat, Turn
from focus_jax.cli.arguments import Parser, argv_or, not_negative
from focus_jax.cli.common import friendly
from focus_jax.data.conversation import TEMPLATES
from focus_jax.experiment import usual_samplers
from focus_jax.methods import parse_method
from focus_jax.pipeline import Pipeline, load
from focus_jax.sampling import Sampling

QUIT = ("", "exit", "quit")


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Stream the answer to one question, or hold a conversation."""
    flags = parser().parse_args(argv_or(argv))
    if flags.question == "":
        raise ValueError("the question is empty: ask something")
    missing = [image for image in flags.image if not image.is_file()]
    if missing:
        raise FileNotFoundError(f"no image at {missing[0]}")
    template = next((t for t in TEMPLATES if t.name == flags.template), None)
    vlm = load(
        flags.checkpoint, dtype=flags.dtype, images=flags.preprocessing, template=template,
        vision_tower=flags.vision_tower, tokenizer=flags.tokenizer,
    )  # fmt: skip
    if flags.method:
        method = parse_method(flags.method, usual_samplers(vlm.vlm.cfg))
        vlm = vlm.with_method(method, flags.init_samplers)
    chat = vlm.chat(flags.image, cuts=flags.cuts, seed=flags.seed, **sampling(flags))
    if flags.question is not None:
        answer(vlm, chat, flags.question)
        return 0
    return converse(vlm, chat)


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax chat",
        description="Ask a LLaVA checkpoint about photos. Without a question: a conversation.",
    )
    out.add_argument("question", nargs="?", help='a text; "<image>" places an image inside it')
    out.add_argument("--checkpoint", required=True, metavar="DIR", help="or a name on the hub")
    out.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated"
    )
    out.add_argument("--method", default="", metavar="M", help="e.g. focusllava:text.keep=0.2")
    out.add_argument(
        "--init-samplers", choices=["", "random"], default="",
        help="a learned method on a checkpoint without its weights is an error otherwise",
    )  # fmt: skip
    out.add_argument(
        "--cuts", choices=["keep", "anew"], default="keep",
        help="at later questions: the visual tokens that the first one kept, or chosen anew",
    )  # fmt: skip
    for field in fields(Sampling):
        if field.name != "stop":
            kind = float if field.type is float else not_negative
            flag = "--" + field.name.replace("_", "-")
            out.add_argument(flag, type=kind, default=field.default, metavar="N")
    out.add_argument("--seed", type=not_negative, default=0, metavar="N")
    out.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: float32 on a CPU, else bfloat16"
    )
    out.add_argument("--preprocessing", choices=["original", "hf"], default="original")
    out.add_argument("--template", choices=[t.name for t in TEMPLATES], help="default: its own")
    out.add_argument("--vision-tower", metavar="DIR", help="for checkpoints in LLaVA's own layout")
    out.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint lacks its own")
    return out


def sampling(flags) -> dict[str, float | int]:
    """The flags that are fields of `Sampling`."""
    return {f.name: getattr(flags, f.name) for f in fields(Sampling) if f.name != "stop"}


def answer(vlm: Pipeline, chat: Chat, question: str) -> None:
    """Stream one answer to stdout; what it took goes to stderr."""
    for piece in chat.ask(question):
        print(piece, end="", flush=True)
    print(flush=True)
    print(summary(vlm, chat.turns[-1]), file=sys.stderr, flush=True)


def converse(vlm: Pipeline, chat: Chat) -> int:
    """Questions from the terminal until an empty line."""
    names = ", ".join(QUIT[1:])
    print(f"An empty line (or {names}) ends the conversation.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return 0
        if question.lower() in QUIT:
            return 0
        try:
            answer(vlm, chat, question)
        except ValueError as error:  # the conversation is as it was: ask otherwise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr)


def summary(vlm: Pipeline, turn: Turn) -> str:
    """Visual tokens by layer, seconds to the first token, tokens per second."""
    bounds = (0, *vlm.vlm.method.bounds)
    kept = ", ".join(f"{n} from layer {at}" for n, at in zip(turn.visual, bounds, strict=True))
    return (
        f"[{vlm.vlm.method.name}: visual tokens {kept}; first token after {turn.prefill:.2f} s; "
        f"{len(turn.tokens)} tokens, {turn.rate:.1f} a second]"
    )


if __name__ == "__main__":
    sys.exit(main())
