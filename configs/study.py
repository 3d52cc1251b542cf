"""The study: which trainings and which measurements stand behind docs/study.md.

Every arm costs one training of the last stage and one evaluation for each seed; prune `arms` to
save time. All baselines spend FocusLLaVA's own mean slots.
"""

from dataclasses import replace

import glyphs_base
import glyphs_focus
import glyphs_language

from focus_jax.evaluate.budgets import squares
from focus_jax.experiment import Experiment
from focus_jax.models.vlm import dims_of
from focus_jax.study.config import Arm, Study, at_share, behind_uniform_at, mean_share

CUT_KEEP = 0.1  # of the arms with one cut
PLAIN = ("random", "uniform", "pool", "downsample")


def arms(base: Experiment) -> tuple[Arm, ...]:
    """What is trained; the page says `not measured` where an arm is left out."""
    ours = "focusllava:vision.gate=distortion"
    share, dims = mean_share(base, ours), dims_of(base.model, 1)
    switch, through = "focusllava:vision.gate=switch", "focusllava:vision.gate=straight_through"
    layers, cut = cut_layers(dims.layers), f"text_only:text.keep={CUT_KEEP}"
    middle = f"cut_{layers[1]}"
    return (
        Arm("full", "full", role="full"),
        Arm("focusllava", ours, role="ours"),
        *(Arm(name, plain(base, name, share), role="plain") for name in PLAIN),
        *(
            Arm(f"gate_{gate}", f"focusllava:vision.gate={gate}", role="gate")
            for gate in ("random", "uniform", "oracle")
        ),
        Arm("switch", switch, role="router"),
        Arm("straight_through", through, role="router"),
        Arm("unaligned", ours, aligned=False, role="part", against="focusllava"),
        # Its balance loss is all that it can be aligned by: both go one after the other.
        Arm("switch_unaligned", switch, aligned=False, role="part", against="switch"),
        Arm(
            "switch_no_balance", f"{switch},vision.balance=0", aligned=False, role="part",
            against="switch_unaligned",
        ),
        Arm(
            "straight_no_noise", f"{through},vision.noise=0", role="part",
            against="straight_through",
        ),
        *(Arm(f"cut_{at}", f"{cut},text.layer={at}", role="cut") for at in layers),
        Arm(
            f"{middle}_random", f"{cut},text.layer={layers[1]},text.rank=random", role="part",
            against=middle,
        ),
        # Published methods that have a trained path.
        Arm("prumerge", at_share(base, "prumerge", share)),
        Arm("pyramiddrop", behind_uniform_at(base, "pyramiddrop", share)),
        Arm("vtw", vtw(dims.layers)),
    )  # fmt: skip


def plain(base: Experiment, name: str, share: float) -> str:
    """A scheme that looks at nothing, with no fewer slots than `share`: squares come in steps."""
    if name in ("pool", "downsample"):
        dims = dims_of(base.model, base.tiles)
        return f"{name}:size={min(s for s in squares(dims) if s**2 >= share * dims.patches)}"
    return at_share(base, name, share)


def cut_layers(layers: int) -> tuple[int, ...]:
    """First, middle and last."""
    return (0, layers // 2, layers - 1)


def vtw(layers: int) -> str:
    """Withdrawal a quarter in, before a layer around it in training."""
    at = max(1, layers // 4)
    return f"vtw:layer={at},train_layers={at}/{at + 1}"


def get_study(size: str = "cpu") -> Study:
    """`cpu`: minutes a seed on a few cores. `gpu`: images in tiles, a larger model, three seeds."""
    base = glyphs_base.get_config()
    if size == "cpu":
        joint = replace(glyphs_focus.JOINT, steps=100, batch=12)
        return Study(
            base,
            joint,
            arms(base),
            seeds=(0, 1),
            validation=64,
            test=128,
            placed=64,
        )
    base = larger(base)
    joint = replace(glyphs_focus.JOINT, steps=4 * glyphs_focus.JOINT.steps, batch=32)
    joint = replace(joint, train=(*joint.train, "image_newline"))
    layers = base.model.decoder.layers
    return Study(base, joint, arms(base), seeds=(0, 1, 2), layers=tuple(range(layers)), batch=32)


def larger(base: Experiment) -> Experiment:
    """Twice the side of the image, shown as a thumbnail and 2 x 2 tiles to the same tower.

    Eight decoder layers trained from nothing, the same shares.
    """
    glyphs, decoder = base.data.glyphs, base.model.decoder
    side = 2 * glyphs.grid
    glyphs = replace(glyphs, grid=side, validation=256, test=512)
    # 5 x 256 patches, 32 newlines, and the text.
    decoder = replace(decoder, layers=2 * decoder.layers, max_position=2048)
    # The vision sampler's budget is a view's, and views are as large as before: it stays.
    text = replace(base.compress.text, layer=2 * base.compress.text.layer)
    language = tuple(  # no decoder of this size lies ready
        replace(stage, glyphs=replace(stage.glyphs, grid=side))
        for stage in glyphs_language.get_config().train.stages
        if stage.glyphs
    )
    model = replace(base.model, max_tiles=5, image_newline=True, grids=((2, 2),))
    return replace(
        base,
        name=f"{base.name}_gpu",
        model=replace(model, decoder=decoder, attention="xla"),
        compress=replace(base.compress, text=text),
        data=replace(base.data, glyphs=glyphs),
        train=replace(base.train, stages=(*language, *base.train.stages), init_from=""),
    )
