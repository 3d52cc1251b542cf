"""Which methods the study measures, on which weights: the rows of its tables."""

from collections.abc import Iterator
from dataclasses import dataclass

from focus_jax.evaluate.budgets import spending
from focus_jax.evaluate.runner import Trained
from focus_jax.methods import parse_method
from focus_jax.study.config import Arm, Study, overridden


@dataclass(frozen=True)
class Asked:
    """A method to measure: on the weights of an arm, or of one that learned with it."""

    name: str
    weights: str
    text: str
    trained: bool = False
    share: float = 0.0

    @property
    def file(self) -> str:
        """Where its answers lie, in a seed's folder."""
        budget = f"_{self.share:g}" if self.share else ""
        return f"answers/{self.weights}/{self.name}{budget}.json"


def trained_rows(study: Study) -> list[Asked]:
    """Every arm on its own weights."""
    return [Asked(arm.name, arm.name, text_of(study, arm), trained=True) for arm in study.arms]


def text_of(study: Study, arm: Arm) -> str:
    """An arm's method in words; of "" the base's own in full."""
    compress = study.base.compress
    if arm.method or compress.method:
        return arm.method or compress.method
    halves = {(True, True): "focusllava", (True, False): "vision_only", (False, True): "text_only"}
    return halves.get((compress.vision.enabled, compress.text.enabled), "full")


def gate_rows(study: Study) -> list[Asked]:
    """Control gates on the weights of the method under study."""
    ours = study.arm("ours")
    text = text_of(study, ours)
    return [
        Asked(gate, ours.name, overridden(text, "focusllava", vision__gate=gate))
        for gate in study.gates
    ]


def routed_rows(study: Study) -> list[Asked]:
    """Whatever has a router: arms on their own weights, control gates on those of ours."""
    roles = ("ours", "budget", "gate", "router", "part")
    arms = [arm for arm in study.arms if arm.role in roles]
    with_stage = [arm for arm in arms if text_of(study, arm).startswith(("focusllava", "vision"))]
    own = [Asked(arm.name, arm.name, text_of(study, arm), trained=True) for arm in with_stage]
    return own + gate_rows(study)


def method_rows(study: Study, run: Trained, share_: float) -> Iterator[Asked]:
    """Every method at one share, on weights trained with all tokens, and FocusLLaVA on its own.

    What cannot spend so little is left out. FocusLLaVA's router has no weights on full's side:
    regions are ranked by the measured loss there.
    """
    for name in study.methods:
        found = spending(run, name, share_)
        if not found.asked:
            continue
        yield Asked(name, study.arm("full").name, found.asked, share=share_)
        if name == "focusllava":  # the trained one at this share, which it was not trained at
            ours, compress = study.arm("ours"), run.config.compress
            gate = parse_method(text_of(study, ours), compress).vision.gate  # type: ignore[attr-defined]
            text = overridden(found.asked, name, vision__gate=gate)
            yield Asked(name, ours.name, text, share=share_)
