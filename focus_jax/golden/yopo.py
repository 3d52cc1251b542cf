"""Recorded decoder runs of YOPO: every layer's rows, and who sees whom among visual tokens."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from focus_jax.compress.method import (
    Aux,
    Context,
    Cut,
    LayerView,
    Method,
    VisualTokens,
    empty_aux,
)
from focus_jax.compress.select import Selection
from focus_jax.compress.visual_compute import find_layout
from focus_jax.compress.yopo import yopo
from focus_jax.generate import Caches, append
from focus_jax.golden.case import Recorded
from focus_jax.golden.decoder import Case, inputs_of, load, packed_rows, read_case
from focus_jax.models.streams import Streams, pack
from focus_jax.models.visual_compute import is_visual, masked_rows
from focus_jax.models.vlm import VLM, Inputs, every_dims

GIVEN = "inputs_embeds|decode_embeds|head_mask|rows"


@dataclass(frozen=True)
class Watch(Cut):
    """Takes nothing away: where it stands a stage begins, whose rows can be looked at."""

    def slots(self, entering: int, train: bool = False) -> int:
        return entering

    def select(self, layer: LayerView, slots: int, ctx: Context) -> tuple[Selection, Aux]:
        index = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), layer.visual_valid.shape)
        return Selection(index[:, None], layer.visual_valid[:, None]), empty_aux()


def replay(recorded: Recorded) -> dict[str, np.ndarray]:
    """The masked mode, layer by layer."""
    case = read_case(recorded.directory)
    vlm = load(case, method_of(case))
    out = run(vlm, *inputs_of(case), further=case.decode is not None)
    found = {name: np.asarray(a) for name, a in out.items()}
    rows = recorded.array("rows")
    found["hidden_rows"] = found["hidden_rows"][:, :, rows]
    if recorded.arrays.get("hidden_rows", rows).ndim == 3:
        [found["hidden_rows"]] = found["hidden_rows"].swapaxes(0, 1)
    return found


def method_of(case: Case) -> Method:
    """The four knobs, and a stage for each layer."""
    knobs, depth = case.knobs, case.decoder.layers
    cut_at = knobs["layercut_num"]
    method = yopo(
        window=2 * ((knobs["attncut_w"] - 1) // 2) + 1,
        layers=cut_at if cut_at < depth else None,
        ffn=knobs["mlpcut_ratio"], heads=None, mode="masked", mass="official",
    )  # fmt: skip
    assert method.compute is not None
    mask = case.arrays.get("head_mask")
    heads = None if mask is None else tuple(tuple(row) for row in mask.tolist())
    return replace(
        method, compute=replace(method.compute, heads=heads),
        cuts=tuple(Watch(layer=i) for i in range(1, depth)),
    )  # fmt: skip


@partial(jax.jit, static_argnames="further")
def run(vlm: VLM, tokens: Inputs, visual: VisualTokens, further: bool) -> dict[str, Array]:
    """Rows at the entry of each layer and behind the last, prefill, and one more token.

    `hidden_rows` [L+1 B S D].
    """
    streams = vlm.begin(tokens, visual)
    counts = seen_visual(vlm, streams)
    slots, ctx = visual.valid.shape[1], Context(jax.random.key(0))
    entering = [packed_rows(streams)[0]]
    caches: Caches = ()
    for stage in range(len(vlm.decoder.stages)):
        part = vlm.decode(streams, range(stage, stage + 1), slots, ctx, keep=1)
        streams, caches = part.streams, caches + part.caches
        entering.append(packed_rows(streams)[0])
    found = {
        "hidden_rows": jnp.stack(entering),
        "prefill_output": vlm.decoder.norm(entering[-1]),
        "visual_mask_counts": counts[0],
    }
    if further:
        b, texts = len(tokens.tokens), tokens.prefix.size + tokens.tokens.size
        ids = texts + jnp.arange(b)[:, None]
        rows, _ = append(vlm, vlm.decoder.embed(ids), jnp.ones((b, 1), bool), caches)
        found["decode_output"] = vlm.decoder.norm(rows)
    return found


def seen_visual(vlm: VLM, s: Streams) -> Int[Array, "B V"]:
    """How many visual rows each visual row may attend to."""
    packed, slots = pack(s), s.visual.shape[1]
    rows, _ = find_layout(vlm.method, every_dims(vlm.cfg), slots, slots)
    seen = is_visual(packed, s)
    counts = (masked_rows(packed, s, rows) & seen[:, None]).sum(-1, dtype=jnp.int32)
    first = s.prefix.shape[1]
    return counts[:, first : first + slots]
