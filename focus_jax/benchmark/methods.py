"""The methods that are measured: official budgets, layers in proportion to the decoder's depth."""

from collections.abc import Callable
from dataclasses import dataclass

from focus_jax.compress.method import Method
from focus_jax.config import ModelConfig
from focus_jax.experiment import usual_samplers
from focus_jax.methods import NAMES, choose, parse_method, split_methods

DEPTH, PATCHES = 32, 576  # of the model that official layers and counts are meant for
Words = Callable[["Size"], str]


@dataclass(frozen=True)
class Size:
    """The decoder's layers and the patches of a tile."""

    layers: int
    patches: int

    def at(self, layer: int) -> int:
        """The layer that stands where `layer` of 32 does, never the first."""
        return max(1, layer * self.layers // DEPTH)

    def rising(self, *of_32: int) -> list[int]:
        """Such layers for several cuts, each behind the one before.

        ValueError: a decoder with too few layers.
        """
        out: list[int] = []
        for layer in of_32:
            out.append(max(self.at(layer), out[-1] + 1 if out else 1))
        if out[-1] >= self.layers:
            raise ValueError(
                f"cuts before layers {of_32} of {DEPTH} do not fit a decoder of {self.layers} "
                f"layers: give it at least {len(of_32) + 1}"
            )
        return out

    def count(self, tokens: int) -> int:
        """The same share of a tile as `tokens` of 576, at least one."""
        return max(1, round(tokens * self.patches / PATCHES))

    @property
    def half_side(self) -> int:
        """Half of the patches along one side of a tile, at least one."""
        return max(1, round(self.patches**0.5) // 2)


def sparsevlm(size: Size) -> str:
    """Cuts before layers 3, 7 and 16 of 32, each judged by the layer before it."""
    behind = [layer - 1 for layer in size.rising(3, 7, 16)]
    return f"sparsevlm:layers={slashed(behind)}"


def yopo(layers: int, window: str, mass: str) -> Words:
    """Visual rows pass `layers` of 32, with half of the heads and of the neurons in all of them."""
    return lambda size: f"yopo:layers={size.at(layers)},window={window},whole=0,mass={mass}"


def slashed(values: list[int]) -> str:
    """A tuple as command lines write it."""
    return "/".join(map(str, values))


# What each is called in the tables, and how a command line asks for it.
MEASURED: dict[str, Words] = {
    "full": lambda size: "full",
    "focusllava": lambda size: "focusllava",
    "vision_only": lambda size: "vision_only",
    "text_only": lambda size: "text_only",
    "random": lambda size: "random",
    "uniform": lambda size: "uniform",
    "pool": lambda size: f"pool:size={size.half_side}",
    "downsample": lambda size: f"downsample:size={size.half_side}",
    "prumerge": lambda size: f"prumerge:budget={size.count(64)}",
    "prumerge_plus": lambda size: f"prumerge_plus:budget={size.count(192)}",
    "visionzip": lambda size: f"visionzip:dominant={size.count(54)},contextual={size.count(10)}",
    "divprune": lambda size: "divprune",
    "cdpruner": lambda size: "cdpruner",
    "trimtokenator": lambda size: "trimtokenator",
    "fastv": lambda size: f"fastv:layer={size.at(2)}",
    "pyramiddrop": lambda size: f"pyramiddrop:layers={slashed(size.rising(8, 16, 24))}",
    "sparsevlm": sparsevlm,
    "vtw": lambda size: f"vtw:layer={size.at(16)}",
    "yopo_1.91T": yopo(16, "none", "renormalise"),
    "yopo_0.92T": yopo(8, "5", "renormalise"),
    "yopo_official": yopo(16, "5", "official"),
}


def chosen(text: str) -> tuple[str, ...]:
    """Names of a list such as `all` or `fastv,random:keep=0.1`; `full` comes first, always.

    A name of `MEASURED` gets its official budget; any other method is taken as it is written.
    ValueError: a name that is neither, with those near it.
    """
    names = list(MEASURED) if text == "all" else split_methods(text)
    for name in names:
        known = name.partition(":")[0].split("+")[0] in NAMES
        if name not in MEASURED and not known:
            raise ValueError(f"unknown method {name!r}: {choose(name, ('all', *MEASURED))}")
    return ("full", *(name for name in dict.fromkeys(names) if name != "full"))


def words_of(name: str, cfg: ModelConfig) -> str:
    """How a command line asks for a method of `MEASURED` on a model of these sizes."""
    size = Size(cfg.decoder.layers, cfg.vision.patches)
    return MEASURED[name](size) if name in MEASURED else name


def build(name: str, cfg: ModelConfig) -> Method:
    """The method; FocusLLaVA's samplers in their usual proportions. ValueError: it does not fit."""
    return parse_method(words_of(name, cfg), usual_samplers(cfg))
