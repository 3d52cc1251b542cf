"""Methods at equal cost: the arguments with which each spends a given share of visual slots."""

from collections.abc import Callable
from dataclasses import dataclass

from focus_jax.compress.baselines import Pool
from focus_jax.compress.method import Dims
from focus_jax.evaluate.runner import Trained
from focus_jax.models.params import is_sampler
from focus_jax.models.vlm import dims_of

STEPS = 30  # of the bisection: finer than one token of any image
SLACK = 1.005  # of a share: half a token in a hundred
ENOUGH = 0.9  # of a share: whole layers are coarse steps
Words = Callable[[float], str]


@dataclass(frozen=True)
class Spending:
    """A method as asked for on a command line, and its mean slots as a share of full's.

    `asked` is "" where even the least that the method can spend is above what was wanted.
    """

    name: str
    asked: str
    share: float


def spenders(run: Trained) -> dict[str, Words]:
    """For each method the words that ask for it, from one number in (0, 1]: more spends more.

    Cuts stand as early as the method allows: in a shallow decoder the layers before them weigh
    most. Proportions among a method's own knobs are its published ones. Where a run has no weights
    for the router that its config names, regions are ranked by the measured loss.
    """
    dims = dims_of(run.config.model, run.config.tiles)
    n, side, depth = dims.patches, dims.rows, dims.layers  # patches of one view
    seen = -min(2, run.config.model.vision.layers)  # the tower's last but one layer, if it has two
    third = [max(1, i * depth // 4) for i in (1, 2, 3)]  # 8, 16, 24 of 32
    gate = ",vision.gate=measured" if lacks_router(run) else ""
    near = f",neighbours={n - 1}" if n <= 32 else ""  # officially 32

    def zipped(x: float) -> str:
        total = max(2, int(n * x))
        contextual = max(1, round(total * 10 / 64))
        return f"visionzip:dominant={total - contextual},contextual={contextual},layer={seen}"

    def pruned(x: float) -> str:
        top = max(1, int(n * x) - 1)
        return f"prumerge:ratio={(top + 0.5) / n:.6f},budget={top}{near}"

    def spread(x: float) -> str:
        kept = max(2, int(n * x) - 1)
        return f"prumerge_plus:ratio={(kept // 2 + 0.5) / n:.6f},budget={kept}{near}"

    def sparse(x: float) -> str:
        counts = [max(1, int(n * x * part / 300)) for part in (300, 200, 110)]
        after = "/".join(str(layer - 1) for layer in third)
        return f"sparsevlm:layers={after},keep={'/'.join(map(str, counts))},of={n}"

    def share(name: str) -> Words:
        return lambda x: f"{name}={x:.6f}"

    def square(name: str) -> Words:
        sizes = squares(dims)
        return lambda x: f"{name}:size={max(s for s in sizes if s <= max(1, side * x**0.5 + 1e-6))}"

    def until(x: float) -> int:
        return max(1, int(depth * x))

    falling = "/".join(map(str, third))
    return {
        "random": share("random:keep"),
        "uniform": share("uniform:keep"),
        "pool": square("pool"),
        "downsample": square("downsample"),
        "prumerge": pruned,
        "prumerge_plus": spread,
        "visionzip": zipped,
        "divprune": share("divprune:keep"),
        "cdpruner": share("cdpruner:keep"),
        "trimtokenator": share("trimtokenator:keep"),
        "fastv": share("fastv:layer=1,keep"),
        "pyramiddrop": lambda x: (
            f"pyramiddrop:layers={falling},keep={x:.6f}/{x / 2:.6f}/{x / 4:.6f}"
        ),
        "sparsevlm": sparse,
        "vtw": lambda x: f"vtw:layer={until(x)}",
        "yopo": lambda x: f"yopo:layers={until(x)},window=5,heads=none,ffn=2",
        "text_only": share("text_only:text.layer=1,text.keep"),
        "vision_only": lambda x: f"vision_only:vision.budget={max(1, int(n * x))}{gate}",
        "focusllava": lambda x: f"focusllava:vision.budget={max(1, int(n * x))}{gate}",
    }


def lacks_router(run: Trained) -> bool:
    """Whether the config's vision-guided sampler learns, and the run holds no weights of one."""
    return run.config.compress.vision.learns and not any(map(is_sampler, run.tree))


def squares(dims: Dims) -> tuple[int, ...]:
    """Sides of the grids that a view can be pooled to, rising: in stitched images its divisors."""

    def stands(size: int) -> bool:
        try:
            Pool(size).check(dims)
        except ValueError:
            return False
        return True

    return tuple(filter(stands, range(1, dims.rows + 1)))


def behind_uniform(dims: Dims) -> dict[str, Words]:
    """Cuts at their published shares behind uniform sampling: what a shallow decoder can afford."""
    third = "/".join(str(max(1, i * dims.layers // 4)) for i in (1, 2, 3))
    after = "/".join(str(max(1, i * dims.layers // 4) - 1) for i in (1, 2, 3))
    half = max(1, dims.layers // 2)
    cuts = {
        "fastv": "fastv:layer=1,keep=0.5",
        "pyramiddrop": f"pyramiddrop:layers={third},keep=0.5/0.25/0.125",
        "sparsevlm": f"sparsevlm:layers={after},keep=300/200/110,of=576",
        "vtw": f"vtw:layer={half}",
        "yopo": f"yopo:layers={half},window=5,heads=none,ffn=2",
        "text_only": "text_only:text.layer=1,text.keep=0.25",
    }

    def words(cut: str) -> Words:
        return lambda x: f"uniform:keep={x:.6f}+{cut}"

    return {name: words(cut) for name, cut in cuts.items()}


def spending(run: Trained, name: str, share: float) -> Spending:
    """The method with the most slots whose mean share is not above `share`.

    A cut that cannot spend so little by itself, or only far less, stands behind uniform sampling.
    ValueError: an unknown name.
    """
    dims = dims_of(run.config.model, run.config.tiles)
    alone, behind = spenders(run), behind_uniform(dims)
    if name not in alone:
        raise ValueError(f"no budgets are known for {name!r}: choose from {', '.join(alone)}")
    found = most(run, alone[name], share)
    if name in behind and (found is None or found[1] < ENOUGH * share):
        found = most(run, behind[name], share)
    return Spending(name, *(found or ("", 0.0)))


def most(run: Trained, words: Words, share: float) -> tuple[str, float] | None:
    """By bisection: the words that spend the most within `share`, and what they spend."""

    def cost(x: float) -> float | None:
        """Mean share; None where the method cannot stand with so little."""
        try:
            return run.plan(run.method(words(x))).mean_share
        except ValueError:
            return None

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = cost(middle)
        low, high = (middle, high) if found is None or found <= share * SLACK else (low, middle)
    found = cost(low) if low else None
    return None if found is None or found > share * SLACK else (words(low), found)
