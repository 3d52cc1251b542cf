r"""LLaVA's two stages with FocusLLaVA's samplers: what the focusllava_* programs share.

Stage 1 aligns: the projector, the newline and the samplers learn at 1e-3, 558,000 captions in
batches of 256. Stage 2 instructs: all but the tower learns at 2e-5, 665,000 conversations in
batches of 128, as LLaVA-1.5 does; LLaVA-NeXT trains the tower too, at a fifth of its 1e-5
(`train=("",)`, `learning_rate=1e-5`, `scale=(("vision.", 0.2),)`).

The data are LLaVA's, built once (docs/data.md tells how to name the archives of each source):

    python -m focus_jax data build --json blip_laion_cc_sbu_558k.json --images images.zip \
        --out data/llava_pretrain
    python -m focus_jax data build --json llava_v1_5_mix665k.json --out data/llava_mix665k \
        --images FOLDER

Other folders: `--train.stages.0.dataset`, `--train.stages.1.dataset`. Stage 1 is template `plain`,
stage 2 the model's own. Training starts from `--train.init-from decoder=VICUNA,vision=CLIP`.
Dialogues are padded to `data.lengths`; for plans text is 1,024 tokens, 48 before the image (the
system's words) and 976 behind it.

A caption asks nothing, so that a text-guided sampler has nothing to go by in stage 1: its scores
are equal, and the first tokens stay.
"""

from dataclasses import replace

from focus_jax.config import ModelConfig
from focus_jax.experiment import DataConfig, Experiment, TrainConfig, TrainStage, usual_samplers

ALIGN = TrainStage(
    "align", "answers", steps=2180, learning_rate=1e-3,
    train=("projector.", "image_newline", "samplers."), batch=256, questions=1, final=0.0,
    dataset="data/llava_pretrain", template="plain",
)  # fmt: skip
INSTRUCT = TrainStage(
    "instruct", "answers", steps=5197, learning_rate=2e-5,
    train=("decoder.", "projector.", "image_newline", "samplers."), batch=128, questions=1,
    final=0.0, dataset="data/llava_mix665k",
)  # fmt: skip


def experiment(name: str, model: ModelConfig) -> Experiment:
    """Both stages of a model: bf16 compute, fp32 masters, splash attention."""
    return Experiment(
        name=name,
        model=replace(
            model, param_dtype="float32", compute_dtype="bfloat16", attention="splash", remat="dots"
        ),
        compress=usual_samplers(model),
        data=DataConfig(
            template="vicuna_v1",
            text_length=976,
            prefix_length=48,
            lengths=(64, 256, 512, 1024, 2048),
        ),
        train=TrainConfig(stages=(ALIGN, INSTRUCT), b2=0.999, save_every=500, mesh="fsdp"),
    )
