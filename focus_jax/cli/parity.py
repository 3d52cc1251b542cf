"""`python -m focus_jax parity`: a checkpoint here and in transformers, compared."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from focus_jax.cli.arguments import Parser, argv_or, positive
from focus_jax.cli.common import friendly
from focus_jax.parity import TOLERANCES, compare


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON line. Exit 0 when the two are equal, 1 when they are not."""
    flags = parser().parse_args(argv_or(argv))
    report = compare(
        flags.checkpoint, flags.prompt, flags.image, new_tokens=flags.new_tokens,
        dtype=flags.dtype, dump=flags.dump,
    )  # fmt: skip
    print(json.dumps(report.to_json()))
    return 0 if report.equal else 1


def parser() -> Parser:
    """The flags of this command."""
    out = Parser(
        "python -m focus_jax parity",
        description=(
            "Run a LLaVA checkpoint here and in transformers (torch, float32, on the CPU) with all "
            "visual tokens; compare image features, logits of every prompt position, and greedy "
            "tokens up to the first stop token. Images are preprocessed as Hugging Face does it."
        ),
        epilog=bars(),
    )
    out.add_argument("checkpoint", metavar="DIR", help="or a name on the hub")
    out.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated"
    )
    out.add_argument(
        "--prompt", required=True, metavar="TEXT",
        help='taken literally; "<image>" and a line break go in front for each image that it does '
        "not place",
    )  # fmt: skip
    out.add_argument(
        "--dump", type=Path, metavar="FILE.npz",
        help="keep our input_ids (an image's token repeated for each of its rows), logits [S W] of "
        "every prompt position, image_features [V D] and greedy_tokens",
    )  # fmt: skip
    out.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="default: 32")
    out.add_argument(
        "--dtype", choices=list(TOLERANCES), default="float32", help="ours; default: float32"
    )
    return out


def bars() -> str:
    """What counts as equal."""
    single, half = TOLERANCES["float32"], TOLERANCES["bfloat16"]
    return (
        f"Equal in float32: logits within {single.logits:g}, features within {single.features:g}, "
        "and the same greedy tokens. In bfloat16: the mean difference of logits within "
        f"{half.mean_logits:.0%} of their standard deviation, and the root mean square of that of "
        f"features within {half.rms_features:.0%} of theirs; greedy tokens are told only. "
        "Otherwise first_mismatch names the first module, as transformers does, that differs when "
        "it is given what the reference's was given (or 'preprocessing', 'input_ids', 'merged "
        "embeddings'; 'generation' where only tokens differ; 'no single module' where roundings "
        "add up); greedy_parts_at is the first token that differs. "
        "Exit 0 when equal, 1 on a mismatch or an error."
    )


if __name__ == "__main__":
    sys.exit(main())
