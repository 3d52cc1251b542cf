"""How the committed experiments run on slices of pods: mesh, batches of a step, remat."""

from typing import Literal, NamedTuple

from focus_jax.experiment import Experiment


class Setting(NamedTuple):
    """A mesh; into how many batches a step's images are split; `model.remat`, "" as it is."""

    mesh: str
    accumulate: int = 1
    remat: Literal["", "none", "full", "mlp", "dots"] = ""


SMALL = {
    "v5e:8x8": Setting("fsdp=32,tensor=2", accumulate=2, remat="mlp"),
    "v5e:16x16": Setting("fsdp=64,tensor=4"),
    "v5p:4x4x4": Setting("fsdp=16,tensor=4"),
    "v5p:4x4x8": Setting("fsdp=32,tensor=4"),
    "h100:8": Setting("fsdp=8", accumulate=4),
}
SETTINGS: dict[str, dict[str, Setting]] = {
    "focusllava_7b": SMALL,
    # Its vocabulary is four times as large.
    "focusllava_llama3_8b": SMALL
    | {"v5e:8x8": Setting("fsdp=32,tensor=2", accumulate=4, remat="mlp")},
    "focusllava_13b": {
        "v5e:8x8": Setting("fsdp=32,tensor=2", accumulate=4, remat="mlp"),
        "v5e:16x16": Setting("fsdp=64,tensor=4"),
        "v5p:4x4x4": Setting("fsdp=16,tensor=4"),
        "v5p:4x4x8": Setting("fsdp=32,tensor=4"),
        "h100:8": Setting("fsdp=8", accumulate=8),
    },
}


def setting(cfg: Experiment, topology: str) -> Setting:
    """Of a committed experiment there, otherwise the experiment's own mesh (`train.mesh`)."""
    return SETTINGS.get(cfg.name, {}).get(topology, Setting(cfg.train.mesh))
