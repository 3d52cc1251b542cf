"""Runs on dialogues: from LLaVA's JSON to losses; what they refuse; several devices."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from focus_jax import training, workdir
from focus_jax.cli.data import main as data
from focus_jax.cli.train import main as train
from focus_jax.compress import baselines
from focus_jax.config import llava_1_5_7b, llava_next_vicuna_7b
from focus_jax.data.built import open_built
from focus_jax.data.conversation import BRIEF, encode_dialogue
from focus_jax.data.dialogue_plan import Shape
from focus_jax.data.preprocess import ImageConfig
from focus_jax.data.tokenizer import build_tokenizer, save_tokenizer
from focus_jax.dialogues import check_context, image_config, tokenizer_of
from focus_jax.experiment import DataConfig, Experiment, usual_samplers
from focus_jax.models.vlm import dims_of
from focus_jax.pods.counts import Request
from focus_jax.sharding import make_layout
from focus_jax.throughput import CLOCKED, Loads, load_of
from tests.data.dialogue_source import dialogue, photo
from tests.micro_dialogues import get_config

PROGRAM = Path(__file__).with_name("micro_dialogues.py")
ROOT = Path(__file__).parents[1]
# Of 3 and 5 views; too few of 3 for a shape of their own.
SIZES = [(16, 32)] * 2 + [(48, 48)] * 8


def write_llava(folder: Path) -> None:
    """LLaVA's JSON and a folder of photos: 10 of one image, 5 of text alone, 4 of two images."""
    rows, photos = [], folder / "photos"
    photos.mkdir(parents=True)
    images = {f"{i}.png": photo(*size, seed=i) for i, size in enumerate(SIZES)}
    for name, encoded in images.items():
        (photos / name).write_bytes(encoded)
    own = [[name] for name in images] + [[]] * 5 + [["0.png", "9.png"]] * 4
    for number, names in enumerate(own):
        turns = dialogue("", [b""] * len(names), turns=1 + number % 2, words=1 + number % 3).turns
        said = [{"from": who, "value": text} for turn in turns
                for who, text in zip(("human", "gpt"), turn, strict=True)]  # fmt: skip
        row = {"id": f"row{number}", "conversations": said}
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A built data set, a tokenizer, and the flags that name them."""
    folder = tmp_path_factory.mktemp("llava")
    write_llava(folder)
    out, words = folder / "built", folder / "words"
    asked = ["--json", str(folder / "rows.json"), "--images", str(folder / "photos")]
    assert data(["build", *asked, "--out", str(out), "--workers", "1"]) == 0
    tokenizer = build_tokenizer(["what is here red ? 0 1"], (), ("USER:", "ASSISTANT:"))
    save_tokenizer(tokenizer, words)
    flags = ["--data.dataset", str(out), "--data.tokenizer", str(words)]
    config = get_config()
    config = replace(config, data=replace(config.data, dataset=str(out), tokenizer=str(words)))
    return SimpleNamespace(folder=out, words=words, flags=flags, config=config)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def run(built, folder, *flags):
    given = ["--config", str(PROGRAM), "--workdir", str(folder), "--quiet", *built.flags, *flags]
    return train(given)


@pytest.fixture(scope="module")
def whole(built, kept_programs, tmp_path_factory):
    """The metrics of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(built, folder) == 0
    return metrics(folder)


@pytest.mark.slow
def test_training_on_dialogues_goes_on_bit_equal(built, whole, tmp_path):
    cut, rows = tmp_path / "cut", whole
    assert [row["step"] for row in rows] == list(range(1, 6))
    assert all(np.isfinite(row["loss"]) for row in rows)
    # Steps of text alone report no sampler; those with images do.
    assert {"loss_router" in row for row in rows} == {False, True}
    for row in rows:
        assert ("loss_router" in row) == ("text/kept@1" in row) == ("vision/tokens" in row)

    see = training.Watch.see

    def stopping(watch, step, *seen):
        see(watch, step, *seen)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Watch, "see", stopping)
        run(built, cut)
    # The data set may have moved meanwhile, and the tokenizer's first place be gone.
    moved = shutil.copytree(built.folder, tmp_path / "moved")
    assert run(built, cut, "--data.dataset", str(moved)) == 0
    assert metrics(cut) == rows


@pytest.mark.slow
def test_several_devices_see_the_same_batches(built, whole, tmp_path):
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    flags += "--xla_cpu_use_fusion_emitters=false"
    command = [sys.executable, "train.py", "--config", str(PROGRAM), "--workdir", str(tmp_path)]
    command += ["--quiet", *built.flags, "--train.mesh", "fsdp"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, check=True)
    for row, other in zip(metrics(tmp_path), whole, strict=True):
        assert row.keys() == other.keys()
        # Sums in another order, amplified by each step.
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.slow
def test_all_tokens_train_as_well(built, kept_programs, tmp_path):
    flags = ["--compress.method", "full", "--train.stages.0.steps", "2"]
    assert run(built, tmp_path, *flags) == 0
    first, last = metrics(tmp_path)
    assert np.isfinite([first["loss"], last["loss"]]).all() and first["gradient_norm/vision"] > 0


# ---------------------------------------------------------------- the run's folder


def test_a_workdir_keeps_the_tokenizer_and_the_vocabulary(built, tmp_path):
    _, tokenizer, config = workdir.open_workdir(built.config, tmp_path / "run")
    assert config == built.config and config.model.decoder.vocab_size == 64 > len(tokenizer)
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    shutil.move(built.words, tmp_path / "gone")
    try:
        again = workdir.open_workdir(built.config, tmp_path / "run")[1]
        with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*words"):
            workdir.open_workdir(built.config, tmp_path / "other")
    finally:
        shutil.move(tmp_path / "gone", built.words)
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "USER: what is here ? ASSISTANT:"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    # The workdir's own tokenizer serves runs that start from it.
    start = replace(
        built.config, data=replace(built.config.data, tokenizer=""),
        train=replace(built.config.train, init_from=str(tmp_path / "run" / "checkpoints")),
    )  # fmt: skip
    assert tokenizer_of(start).get_vocab() == tokenizer.get_vocab()


def changed(config, stage=None, **fields):
    stages = config.train.stages
    if stage:
        stages = (replace(stages[0], **stage), *stages[1:])
    train = replace(config.train, stages=stages)
    return replace(config, data=replace(config.data, **fields), train=train)


def test_a_moved_data_set_may_serve_and_another_kind_may_not(built, tmp_path):
    workdir.open_workdir(built.config, tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    workdir.open_workdir(changed(built.config, dataset="elsewhere"), tmp_path)
    workdir.open_workdir(changed(built.config, stage={"dataset": "a"}, dataset="b"), tmp_path)
    with pytest.raises(ValueError, match=r"data were dialogues, are the embedded set; choose"):
        workdir.open_workdir(changed(built.config, dataset=""), tmp_path)


@pytest.mark.parametrize(
    ("stage", "fields", "said"),
    [
        ({"objective": "words"}, {}, "stage 'instruct': objective 'words'"),
        ({"clutter": 0.5}, {}, r"clutter=0.5 are for the embedded set"),
        ({"questions": 4}, {}, "questions=4, but a dialogue is one text"),
        ({}, {"tokenizer": ""}, "needs a tokenizer: set data.tokenizer"),
    ],
)
def test_stages_that_dialogues_do_not_have_are_refused(built, tmp_path, stage, fields, said):
    with pytest.raises(ValueError, match=said):
        workdir.open_workdir(changed(built.config, stage, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_without_data_is_refused(built, tmp_path):
    config = changed(built.config, stage={"dataset": "x"}, dataset="")
    two = (*config.train.stages, replace(config.train.stages[0], name="next", dataset=""))
    config = replace(config, train=replace(config.train, stages=two))
    with pytest.raises(ValueError, match="stage 'next' has no data set"):
        workdir.open_workdir(config, tmp_path)


def test_a_vocabulary_too_small_is_named(built, tmp_path):
    model = replace(built.config.model, decoder=replace(get_config().model.decoder, vocab_size=8))
    with pytest.raises(ValueError, match=r"tokens, the model 8: set --model.decoder.vocab-size"):
        workdir.open_workdir(replace(built.config, model=model), tmp_path)


def test_splits_are_for_the_embedded_set(built):
    with pytest.raises(ValueError, match=r"no split 'test' .* evaluate it with --benchmark"):
        workdir.data_source(built.config, "test")


# ---------------------------------------------------------------- batches of a run


def test_a_stage_reads_its_own_data_and_template(built, tmp_path, capsys):
    config = changed(built.config, stage={"dataset": str(built.folder), "template": "plain"})
    tokenizer = workdir.open_workdir(config, tmp_path)[1]
    sources = workdir.train_sources(config)
    stage = config.train.stages[0]
    loaders = {}
    for name, one in (("plain", stage), ("brief", replace(stage, template=""))):
        loaders[name] = workdir.make_train_loader(config, sources, tokenizer, one, 0)
    assert "stage 'instruct': 19 dialogues, 5 steps of 4 an epoch" in capsys.readouterr().err
    counts = {}
    for name, loader in loaders.items():
        batches = iter(loader)
        counts[name] = next(batches)["query_mask"].any()
        batches.close()
    assert counts == {"plain": False, "brief": True}
    source = open_built(built.folder)
    own = np.load(next(built.folder.glob("lengths-*.npy")))
    both = [
        [len(encode_dialogue(tokenizer, template, source.texts(i), n).ids) for i, n in
         enumerate(source.sizes[:, 0].tolist())]
        for template in (BRIEF, workdir.TEMPLATES["plain"])
    ]  # fmt: skip
    assert own.tolist() in both and len(list(built.folder.glob("lengths-*.npy"))) == 2


def test_photos_become_what_the_model_takes():
    def of(model, photos=""):
        return image_config(Experiment("x", model, data=DataConfig(photos=photos)))

    one, many = llava_1_5_7b(), llava_next_vicuna_7b()
    assert of(one) == ImageConfig("pad", 336, 14, background=(122, 116, 104))
    points = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert set(of(many).pinpoints) == set(points) and of(many).layout == "anyres"
    assert of(many, "pad") == of(one)
    assert set(of(replace(many, max_tiles=4)).pinpoints) == set(points) - {(672, 672)}
    with pytest.raises(ValueError, match=r"max_tiles=1 takes one view"):
        of(one, "anyres")


def test_rows_that_exceed_the_context_are_named():
    model = llava_next_vicuna_7b()
    full, focus = baselines.full(), usual_samplers(model).value()
    check_context(model, full, Shape(1, 5, 1024))
    check_context(model, focus, Shape(1, 5, 2048))
    check_context(model, full, Shape(0, 0, 4096))
    two = Shape(2, 5, 2048)
    slots = focus.vision.slots(dims_of(model, 5))
    for method, shape, visual in ((full, Shape(1, 5, 2048), 2928), (focus, two, 2 * slots)):
        said = rf"{shape.text} tokens of text and up to {visual} visual ones.* context of 4096"
        with pytest.raises(ValueError, match=said):
            check_context(model, method, shape)


def test_each_shape_has_its_own_load(built):
    config, layout = built.config, make_layout()
    stage, method = config.train.stages[0], config.compress.value()
    loads = Loads(config, stage, method, layout)

    def batches(images, views, text):
        b = (stage.accumulate, stage.batch)
        return {
            "pixels": np.zeros((*b, images * views, 0)), "image_at": np.zeros((*b, images)),
            "tokens": np.zeros((*b, 1, text)), "prefix": np.zeros((*b, 0)),
        }  # fmt: skip

    alone, one, two = (loads(batches(*shape)) for shape in ((0, 0, 40), (1, 3, 40), (2, 3, 40)))
    assert [load.images for load in (alone, one, two)] == [0, 4, 8]
    assert loads(batches(1, 3, 40)) is one
    assert one == load_of(config, stage, method, layout, Request(3, 40, 0))
    assert alone.tokens == 4 * 40 and two.tokens - one.tokens == one.tokens - alone.tokens
    # Twice the tower and the samplers, and more than twice the decoder's attention.
    assert two.flops - one.flops > one.flops - alone.flops > 0
