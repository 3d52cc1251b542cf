"""The smallest experiment on dialogues, like LLaVA-NeXT's: a config program for tests.

`data.dataset` and `data.tokenizer` are set by flags.
"""

from focus_jax.config import DecoderConfig, ModelConfig, VisionConfig
from focus_jax.experiment import (
    CompressConfig,
    DataConfig,
    Experiment,
    TextSampler,
    TrainConfig,
    TrainStage,
    VisionSampler,
)

# Up to five views of 4 x 4 patches: 16 + 4 x 8 slots and newlines enter, half remain.
MODEL = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=4, width=8, layers=1, heads=2, mlp_width=8,
                        feature_layer=-1),
    decoder=DecoderConfig(
        vocab_size=64, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_width=16
    ),
    max_tiles=5,
    image_newline=True,
)  # fmt: skip


def get_config() -> Experiment:
    stage = TrainStage(
        "instruct", "answers", steps=5, learning_rate=1e-2, batch=2, accumulate=2, questions=1,
        warmup=0.0,
    )  # fmt: skip
    return Experiment(
        name="micro_dialogues",
        model=MODEL,
        compress=CompressConfig(
            vision=VisionSampler(region=2, scales=(2, 1), budget=8, hidden=4),
            text=TextSampler(layer=1, keep=0.5),
        ),
        data=DataConfig(template="brief", lengths=(40,)),
        train=TrainConfig(stages=(stage,), log_every=1, save_every=2, keep=9),
    )
