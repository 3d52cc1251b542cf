"""What a method costs on a model: slots, operations and cache bytes, computed without running."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from focus_jax.compress import visual_compute
from focus_jax.compress.method import Dims, Method
from focus_jax.compress.visual_compute import blocked_pairs, heads_of, in_part, layout

# Element-wise operations of one entry, as compilers count them: one for each add, multiply,
# compare or select; exponentials, sines and roots are not in it.
SOFTMAX = 5  # scale or mask, maximum, difference, sum, quotient
LAYER_NORM, RMS_NORM = 9, 4
ROTATE = 4
ACTIVATION = {"quick_gelu": 4, "gelu": 35}  # exact GELU: the polynomials of the error function
SWIGLU = 5


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide what it costs.

    `tower_depth`: layers that must run for the features. `stem`: channels of the stride-2
    convolutions before the patch embedding, () for none. `compute_bytes`: of one cached number.
    `block`: rows of a block that attends to the keys up to its own end, 0 where every row meets
    every key. `last_row`: a prompt that is only to be continued runs the last layer for its last
    row, beyond keys and values.
    """

    patch_size: int
    image_size: int
    tower_width: int
    tower_layers: int
    tower_depth: int
    tower_heads: int
    tower_mlp: int
    tower_activation: str
    stem: tuple[int, ...]
    projector_layers: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    compute_bytes: int
    block: int = 0
    last_row: bool = False


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image's prefill, two for each multiply-add.

    All but the last are products of matrices; `elementwise` holds norms, softmax, rotary
    positions, activations and residuals of tower, projector and decoder.
    """

    tower: float
    projector: float
    decoder: float
    head: float
    samplers: float
    elementwise: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


class StageRows(NamedTuple):
    """One decoder stage: its layers, its visual slots, rows of a packed sample, and how many."""

    layers: int
    slots: int
    rows: int
    samples: int


@dataclass(frozen=True)
class Plan:
    """The cost of one image with its questions. Slots are array lengths: padded work is work.

    `slots`, `valid`: visual slots of each decoder layer and how many are expected to hold a token.
    `entering`, `full`: slots of the first decoder layer, with this method and with every patch.
    `decoder_macs` is the convention of PyramidDrop and SparseVLM (multiply-adds of visual rows in
    the decoder, 4nd^2 + 2n^2d + 3ndI a layer), `decoder_flops_x2`, YOPO's, twice that; both leave
    out text, grouped keys and the head; with visual compute both count what YOPO's own count does.
    `kv_bytes`: the prompt's cache, a decoder stage each; heads without visual keys keep their room.
    """

    method: str
    tiles: int
    text_tokens: int
    entering: int
    entering_valid: int
    full: int
    slots: tuple[int, ...]
    valid: tuple[int, ...]
    flops: Flops
    decoder_macs: float
    decoder_flops_x2: float
    kv_bytes: tuple[int, ...]

    @property
    def mean_slots(self) -> float:
        """Mean visual slots over decoder layers."""
        return sum(self.slots) / len(self.slots)

    @property
    def share_entering(self) -> float:
        """Slots of the first decoder layer, as a share of those of every patch."""
        return self.entering / max(self.full, 1)

    @property
    def mean_share(self) -> float:
        """Mean slots over decoder layers, as a share of those of every patch."""
        return self.mean_slots / max(self.full, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, with the derived figures."""
        derived = {
            "mean_slots": self.mean_slots,
            "share_entering": self.share_entering,
            "mean_share": self.mean_share,
            "flops_total": self.flops.total,
            "kv_bytes_total": sum(self.kv_bytes),
        }
        fields = asdict(self)
        lists = {name: list(v) for name, v in fields.items() if isinstance(v, tuple)}
        return fields | lists | derived

    def table(self) -> str:
        """A Markdown table; layers with equal numbers share an entry."""
        rows = [
            ("visual slots entering", f"{self.entering} ({self.share_entering:.1%} of full)"),
            ("expected valid tokens entering", f"{self.entering_valid}"),
            ("slots by decoder layer", runs(self.slots)),
            ("expected valid tokens by layer", runs(self.valid)),
            ("mean slots over layers", f"{self.mean_slots:.1f} ({self.mean_share:.1%} of full)"),
            *((f"FLOPs, {part}", amount(n)) for part, n in asdict(self.flops).items()),
            ("FLOPs, total", amount(self.flops.total)),
            ("decoder_macs (visual rows)", amount(self.decoder_macs)),
            ("decoder_flops_x2 (visual rows)", amount(self.decoder_flops_x2)),
            ("KV cache by stage", ", ".join(f"{n / 2**20:.2f} MiB" for n in self.kv_bytes)),
            ("KV cache, total", f"{sum(self.kv_bytes) / 2**20:.2f} MiB"),
        ]
        head = [f"| {self.method} | tiles {self.tiles}, text {self.text_tokens} |", "|---|---|"]
        return "\n".join(head + [f"| {name} | {value} |" for name, value in rows]) + "\n"


def plan(
    method: Method,
    dims: Dims,
    sizes: Sizes,
    text_tokens: int,
    *,
    prefix_tokens: int = 0,
    questions: int = 1,
    head_tokens: int | None = None,
    valid_share: float = 1.0,
    train: bool = False,
    images: int = 1,
) -> Plan:
    """The cost of `method` for one image of `dims.tiles` tiles, forward only.

    `images` of these in one prompt; 0: text alone, of which `dims` still tells the decoder.

    `text_tokens` of each question, behind the image; `prefix_tokens` before it; `questions` share
    the image. `head_tokens` rows a question reach the vocabulary (all without it; 1 when
    generating). `valid_share` of the entering slots is expected to hold a token (from a run's
    metrics, or from the padding of an image). `train` takes the slots of training.
    ValueError: what `method.check` finds, or counts that are no counts.
    """
    check_counts(text_tokens, prefix_tokens, questions, valid_share, images)
    method.check(dims)
    stages = stage_rows(method, dims, text_tokens, prefix_tokens, questions, train, images)
    projected = images * method.vision.slots(dims)
    valid = valid_tokens(method, round(projected * valid_share), stages, train)
    slots = tuple(s.slots for s in stages for _ in range(s.layers))
    macs = sum(visual_macs(method, dims, sizes, n, layer) for layer, n in enumerate(slots))
    cuts = cut_flops(method, dims, sizes, stages, text_tokens, prefix_tokens, questions, images)
    tower, tower_elementwise = (images * each for each in tower_flops(method, dims, sizes))
    hidden = projected * sizes.width * (sizes.projector_layers - 1)
    head_rows = questions * (text_tokens if head_tokens is None else head_tokens)
    decoder, decoder_elementwise = decoder_flops(method, dims, sizes, stages, images)
    last = stages[-1]
    if sizes.last_row and head_tokens == 1 and not in_part(method, last.slots):
        spared = layer_flops(sizes, last.rows) - last_row_flops(sizes, last.rows)
        decoder -= last.samples * spared
    flops = Flops(
        tower=tower,
        projector=2.0 * (projected * sizes.tower_width + hidden) * sizes.width,
        decoder=decoder,
        head=2.0 * head_rows * sizes.width * sizes.vocab_size,
        samplers=images * method.vision.flops(dims) + cuts,
        elementwise=tower_elementwise + hidden * ACTIVATION["gelu"] + decoder_elementwise,
    )
    return Plan(
        method=method.name,
        tiles=dims.tiles,
        text_tokens=questions * text_tokens + prefix_tokens,
        entering=slots[0],
        entering_valid=valid[0],
        full=images * dims.stitched((dims.patches,) * dims.tiles, band=1),
        slots=slots,
        valid=valid,
        flops=flops,
        decoder_macs=float(macs),
        decoder_flops_x2=2.0 * macs,
        kv_bytes=tuple(cache_bytes(sizes, s) for s in stages),
    )


def check_counts(
    text: int, prefix: int, questions: int, valid_share: float, images: int = 1
) -> None:
    """ValueError unless the counts are counts."""
    if text < 1 or prefix < 0 or questions < 1 or images < 0:
        raise ValueError(
            f"plan: text_tokens={text}, prefix_tokens={prefix}, questions={questions}, "
            f"images={images}: use at least 1, 0, 1 and 0"
        )
    if not 0 < valid_share <= 1:
        raise ValueError(f"plan: valid_share={valid_share} is a share of slots: use (0, 1]")


# ------------------------------------------------------------------------------- stages


def stage_rows(
    method: Method,
    dims: Dims,
    text: int,
    prefix: int,
    questions: int,
    train: bool,
    images: int = 1,
) -> list[StageRows]:
    """All decoder stages; a cut of its own for each question makes samples of the questions."""
    edges = (0, *method.bounds, dims.layers)
    samples, out = 1, []
    for stage, slots in enumerate(method.stage_slots(dims, train, images)):
        cut = method.cut_before(stage)
        if cut is not None and not cut.shared:
            samples = questions
        rows = prefix + slots + text * questions // samples
        out.append(StageRows(edges[stage + 1] - edges[stage], slots, rows, samples))
    return out


def valid_tokens(
    method: Method, entering: int, stages: Sequence[StageRows], train: bool
) -> tuple[int, ...]:
    """Expected valid visual tokens of each layer."""
    current, out = entering, []
    for stage, rows in enumerate(stages):
        cut = method.cut_before(stage)
        kept = current if cut is None else cut.slots(entering, train)
        current = min(kept, current, rows.slots)
        out += [current] * rows.layers
    return tuple(out)


def decoder_flops(
    method: Method, dims: Dims, sizes: Sizes, stages: Sequence[StageRows], images: int = 1
) -> tuple[float, float]:
    """Products and element-wise operations of all layers, from the rows that stand in them."""
    products, elementwise, first = 0.0, 0.0, 0
    for stage in stages:
        span = first, first + stage.layers
        if in_part(method, stage.slots):
            own, others = part_flops(method, dims, sizes, stage, span, images)
        else:
            own = stage.layers * layer_flops(sizes, stage.rows)
            others = stage.layers * layer_elementwise(sizes, stage.rows)
        products += stage.samples * own
        elementwise += stage.samples * others
        first = span[1]
    return products, elementwise


def part_flops(
    method: Method,
    dims: Dims,
    sizes: Sizes,
    stage: StageRows,
    span: tuple[int, int],
    images: int = 1,
) -> tuple[float, float]:
    """Products and element-wise operations of the layers `span`, run by visual compute."""
    compute = method.compute
    assert compute is not None
    if compute.mode == "masked":
        whole = replace(sizes, block=0)
        cost = layer_flops(whole, stage.rows), layer_elementwise(whole, stage.rows)
        return stage.layers * cost[0], stage.layers * cost[1]
    rows = layout(method, dims, images, stage.slots)
    text = stage.rows - stage.slots + rows.newlines
    products, elementwise = 0.0, 0.0
    for heads in heads_of(compute, dims, *span, stacked=not sizes.last_row):
        products += visual_compute.layer_flops(compute, sizes, rows, text, heads)
        turned = visual_compute.rotated(compute, sizes, heads)
        neurons = compute.neurons(sizes.mlp_width)
        elementwise += rows.visual * row_elementwise(sizes, turned, neurons)
        own = (sizes.heads + sizes.kv_heads) * sizes.head_dim
        elementwise += text * row_elementwise(sizes, own, sizes.mlp_width)
        entries = visual_compute.layer_softmax(compute, sizes, rows, text, heads)
        elementwise += SOFTMAX * entries
    return products, elementwise


def cut_flops(
    method: Method,
    dims: Dims,
    sizes: Sizes,
    stages: Sequence[StageRows],
    text: int,
    prefix: int,
    questions: int,
    images: int = 1,
) -> float:
    """Operations of all cuts' scores; each looks at the rows of the stage before it.

    There is nothing to score where no visual token stands.
    """
    before = StageRows(0, images * method.vision.slots(dims), 0, 1)
    total = 0.0
    for stage, rows in enumerate(stages):
        cut = method.cut_before(stage)
        if cut is not None and before.slots:
            total += before.samples * cut.flops(
                dims, before.slots, text, sizes.heads * sizes.head_dim,
                sizes.kv_heads * sizes.head_dim, prefix=prefix,
                questions=questions // before.samples,
            )  # fmt: skip
        before = rows
    return total


def cache_bytes(sizes: Sizes, stage: StageRows) -> int:
    """Keys and values of a stage's layers."""
    row = 2 * sizes.kv_heads * sizes.head_dim * sizes.compute_bytes
    return stage.layers * stage.samples * stage.rows * row


# ------------------------------------------------------------------------------- layers


def visual_macs(method: Method, dims: Dims, sizes: Sizes, slots: int, layer: int) -> float:
    """The published count of one layer: multiply-adds of visual rows alone."""
    d, compute = sizes.width, method.compute
    if compute is not None and compute.active:
        return visual_compute.published_macs(compute, method, dims, sizes, slots, layer)
    return 4 * slots * d**2 + 2 * slots**2 * d + 3 * slots * d * sizes.mlp_width


def layer_flops(sizes: Sizes, rows: int) -> float:
    """Products of one decoder layer over `rows` rows."""
    d, inner, kv = sizes.width, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = d * (2 * inner + 2 * kv) + 3 * d * sizes.mlp_width
    return 2.0 * rows * weights + 4.0 * pairs(sizes, rows) * inner


def last_row_flops(sizes: Sizes, rows: int) -> float:
    """Products of a layer that gives keys and values of `rows` rows, the rest for one of them."""
    d, inner, kv = sizes.width, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    one = d * 2 * inner + 3 * d * sizes.mlp_width
    return 2.0 * (rows * d * 2 * kv + one) + 4.0 * rows * inner


def pairs(sizes: Sizes, rows: int) -> int:
    """Rows times the keys that they meet."""
    return blocked_pairs(rows, sizes.block)


def layer_elementwise(sizes: Sizes, rows: int) -> float:
    """Norms, rotary positions, softmax, SwiGLU and residuals of one decoder layer."""
    turned = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    each = row_elementwise(sizes, turned, sizes.mlp_width)
    return rows * each + SOFTMAX * sizes.heads * pairs(sizes, rows)


def row_elementwise(sizes: Sizes, turned: int, neurons: int) -> float:
    """The same for one row, softmax left out; `turned` numbers have rotary positions."""
    return sizes.width * (2 * RMS_NORM + 2) + turned * ROTATE + neurons * SWIGLU


def tower_flops(method: Method, dims: Dims, sizes: Sizes) -> tuple[float, float]:
    """Products and element-wise operations of the tower for all tiles, requests included."""
    grid, c = method.vision.grid or dims.rows, sizes.tower_width
    rows, layers = grid**2 + dims.class_token, tower_layers(method, sizes)
    layer = 2.0 * rows * (4 * c**2 + 2 * c * sizes.tower_mlp) + 4.0 * rows**2 * c
    each = 2 * LAYER_NORM * c + 7 * c + sizes.tower_mlp * (ACTIVATION[sizes.tower_activation] + 1)
    elementwise = rows * each + SOFTMAX * sizes.tower_heads * rows**2
    pixels = 3 * (grid * sizes.patch_size) ** 2
    embed = stem_flops(sizes, grid) + requested_flops(method, sizes, rows)
    if grid != dims.rows:  # a product for each axis resizes the image
        side, short = sizes.image_size, grid * sizes.patch_size
        embed += 2.0 * 3 * (short * side**2 + short**2 * side)
    once = 4 * pixels + rows * c * (LAYER_NORM + 2)
    return dims.tiles * (layers * layer + embed), dims.tiles * (layers * elementwise + once)


def stem_flops(sizes: Sizes, grid: int) -> float:
    """Patch embedding, convolutions before it included."""
    side, channels, total = grid * sizes.patch_size, 3, 0.0
    for a, b in pairwise((3, *sizes.stem)):
        side, channels = side // 2, b
        total += 2.0 * side**2 * 9 * a * b
    patch = side // grid
    return total + 2.0 * grid**2 * patch**2 * channels * sizes.tower_width


def tower_layers(method: Method, sizes: Sizes) -> int:
    """Layers that run: as deep as the features, or as the deepest request."""
    return max([sizes.tower_depth, *(at for _, at in requested(method, sizes))])


def requested(method: Method, sizes: Sizes) -> list[tuple[str, int]]:
    """Names that the vision stage asks for, with their layers counted from 0."""
    parts = [request.split("@") for request in method.vision.requests()]
    return [(name, int(layer) % sizes.tower_layers) for name, layer in parts]


def requested_flops(method: Method, sizes: Sizes, rows: int) -> float:
    """Products of the arrays handed out, for one tile."""
    c = sizes.tower_width
    price = {
        "queries": 2.0 * rows * c**2,
        "keys": 2.0 * rows * c**2,
        "cls_attention": 2.0 * (rows + 1) * c**2 + 2.0 * rows * c,
        "cls_query": 2.0 * c**2,
        "hidden": 0.0,
    }
    return sum(price[name] for name, _ in requested(method, sizes))


# -------------------------------------------------------------------------------- words


def runs(values: Sequence[int]) -> str:
    """Equal neighbours together: `0-15: 576, 16-31: 144`."""
    out, at = [], 0
    for value, group in groupby(values):
        last = at + len(list(group)) - 1
        out.append(f"{at}: {value}" if at == last else f"{at}-{last}: {value}")
        at = last + 1
    return ", ".join(out)


def amount(operations: float) -> str:
    """A number of operations in G or T."""
    big = operations >= 1e12
    return f"{operations / 1e12:.3f} T" if big else f"{operations / 1e9:.3f} G"
