"""Operations that a program needs, from sizes alone: what utilisation is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from focus_jax.compress.method import Method
from focus_jax.compress.plan import Sizes, StageRows, plan, stage_rows
from focus_jax.config import ModelConfig
from focus_jax.evaluate.operations import target_flops
from focus_jax.experiment import TrainStage
from focus_jax.models.lora import is_lora
from focus_jax.models.vlm import dims_of, sizes_of

TRAIN_CONVENTION = (
    "products of matrices of unpadded rows; causal half of attention; forward x3 for parts that "
    "learn, x2 where gradients only pass through (their attention x3), x1 before all that learns"
)
FORWARD_CONVENTION = "products of matrices of unpadded rows, forward; causal half of attention"


@dataclass(frozen=True)
class Request:
    """What one sample has: images of so many tiles (thumbnail included), text behind and before.

    Without images (0), `tiles` says nothing.
    """

    tiles: int
    text: int
    prefix: int
    questions: int = 1
    images: int = 1


class Forward(NamedTuple):
    """Operations of one sample's forward pass, by part; attention of the decoder apart."""

    tower: float
    projector: float
    decoder: float
    attention: float
    head: float
    samplers: float


def forward(
    model: ModelConfig, method: Method, request: Request, train: bool, head_tokens: int | None
) -> Forward:
    """Products of one sample's forward pass, causal half; attention in the tower is its own."""
    dims, sizes = dims_of(model, request.tiles), causal(model)
    cost = plan(
        method, dims, sizes, request.text, prefix_tokens=request.prefix,
        questions=request.questions, head_tokens=head_tokens, train=train, images=request.images,
    ).flops  # fmt: skip
    met = sum(attention(sizes, stage) for stage in stages_of(model, method, request, train))
    # Visual compute counts its own attention, inside its layers: it stays with the decoder's.
    met = 0.0 if method.compute is not None and method.compute.active else met
    samplers = cost.samplers + (request.images * target_flops(method, dims) if train else 0.0)
    return Forward(cost.tower, cost.projector, cost.decoder - met, met, cost.head, samplers)


def causal(model: ModelConfig) -> Sizes:
    """Sizes for which a row meets the keys up to its own and no more."""
    return replace(sizes_of(model), block=1, last_row=False)


def stages_of(model: ModelConfig, method: Method, request: Request, train: bool) -> list[StageRows]:
    """Rows of each decoder stage."""
    return stage_rows(
        method, dims_of(model, request.tiles), request.text, request.prefix, request.questions,
        train, request.images,
    )  # fmt: skip


def attention(sizes: Sizes, stage: StageRows) -> float:
    """Products of rows with the keys they see and their values, over a stage's layers."""
    pairs = stage.rows * (stage.rows + 1) / 2
    return stage.samples * stage.layers * 4.0 * pairs * sizes.heads * sizes.head_dim


def times(stage: TrainStage) -> dict[str, float]:
    """How often each part's forward operations count in a training step (`TRAIN_CONVENTION`).

    A part learns when one of its parameters does; through low-rank updates, whose own operations
    are left out, gradients only pass. Samplers' scores and targets pass no gradient.
    """
    out, reached = {}, False
    for part, prefix in (
        ("tower", "vision."),
        ("projector", "projector."),
        ("newline", "image_newline"),
        ("decoder", "decoder."),
    ):
        own = [p for p in stage.train if p.startswith(prefix) or prefix.startswith(p)]
        learns = not all(map(is_lora, own))
        reached = reached or bool(own)
        out[part] = 3.0 if learns else 2.0 if reached else 1.0
    passed = out["decoder"] > 1
    return out | {"attention": 3.0 if passed else 1.0, "head": out["decoder"], "samplers": 1.0}


def train_flops(model: ModelConfig, method: Method, request: Request, stage: TrainStage) -> float:
    """Operations of one sample in a training step."""
    return weighed(forward(model, method, request, True, None), times(stage))


def prefill_flops(model: ModelConfig, method: Method, request: Request) -> float:
    """Operations of one image's prompt up to the scores of the first new token."""
    return sum(forward(model, method, request, False, head_tokens=1))


def decode_flops(model: ModelConfig, method: Method, request: Request) -> float:
    """Operations of one new token behind one image's prompt."""
    sizes = causal(model)
    width = sizes.width
    inner, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = 2.0 * (width * (2 * inner + 2 * keys) + 3 * width * sizes.mlp_width)
    total = 2.0 * width * sizes.vocab_size
    for stage in stages_of(model, method, request, train=False):
        total += stage.layers * (weights + 4.0 * (stage.rows + 1) * inner)
    return total


def weighed(cost: Forward, by: Mapping[str, float]) -> float:
    """The sum of parts, each so many times."""
    return sum(value * by[name] for name, value in cost._asdict().items())


def entering_rows(model: ModelConfig, method: Method, request: Request, train: bool) -> int:
    """Text and visual tokens of one sample that enter the decoder."""
    first = stages_of(model, method, request, train)[0]
    return first.rows * first.samples
