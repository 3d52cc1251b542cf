"""A run's folder: what it holds, and which experiments may go on in it."""

import errno
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from focus_jax.data.glyphs import KINDS
from focus_jax.experiment import from_json
from focus_jax.sharding import AXES, Layout, ShardingRules
from focus_jax.workdir import (
    data_source,
    glyph_tokenizer,
    loader_config,
    make_eval_loader,
    make_train_loader,
    open_workdir,
    read_workdir,
    write_text,
)
from tests.micro import get_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = get_config()
    directory = str(tmp_path_factory.mktemp("data"))
    return replace(base, data=replace(base.data, directory=directory))


def changed(config, path, value):
    """The config with one field replaced, named by its path."""
    head, _, rest = path.partition(".")
    if isinstance(config, tuple):
        place = int(head)
        return (*config[:place], changed(config[place], rest, value), *config[place + 1 :])
    value = changed(getattr(config, head), rest, value) if rest else value
    return replace(config, **{head: value})


def test_a_workdir_holds_its_config_and_tokenizer(config, tmp_path):
    folder, tokenizer, resolved = open_workdir(config, tmp_path / "new" / "run")
    assert resolved.model.decoder.vocab_size == len(tokenizer) != config.model.decoder.vocab_size
    assert from_json((folder / "config.json").read_text()) == resolved
    stored, again = read_workdir(folder)
    assert stored == resolved and again.get_vocab() == tokenizer.get_vocab()
    # The unresolved config opens it again, and so does the stored one.
    assert open_workdir(config, folder)[2] == open_workdir(stored, folder)[2] == resolved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "tokenizer"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train.seed", 3, "train.seed was 0, is 3"),
        ("train.stages.0.steps", 5, "train.stages.0.steps was 2, is 5"),
        ("train.stages", (), r"train.stages was \(TrainStage.*, is \(\)"),
        ("compress.text.train_keep", (0.2, 0.5), r"train_keep was None, is \(0.2, 0.5\)"),
        ("compress.vision.scales", (2,), r"compress.vision.scales was \(2, 1\), is \(2,\)"),
        ("data.glyphs.groups", 1, "data.glyphs.groups was 2, is 1"),
        ("model.vision.width", 16, "model.vision.width was 8, is 16"),
    ],
)
def test_another_experiment_is_refused(config, tmp_path, path, value, said):
    open_workdir(config, tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=f"config.json belongs to another run: \\S*{said}; choose"):
        open_workdir(changed(config, path, value), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_without_a_checkpoint_settings_may_be_mended(config, tmp_path):
    """A first start that fails, for memory or a wrong name, leaves nothing in the way."""
    open_workdir(config, tmp_path)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    other = open_workdir(changed(config, "data.glyphs.groups", 1), tmp_path)[2]
    assert read_workdir(tmp_path)[0] == other != config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("eval.limit", 3),
        ("data.directory", "elsewhere"),
        ("train.save_every", 7),
        ("train.keep", 9),
        ("train.log_every", 3),
        ("train.devices", 1),
        ("train.mesh", "fsdp=2,tensor=2"),
        ("train.rules", ShardingRules(vocab=())),
    ],
)
def test_what_leaves_the_parameters_alone_may_change(config, tmp_path, path, value):
    open_workdir(config, tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    _, _, resolved = open_workdir(changed(config, path, value), tmp_path)
    assert read_workdir(tmp_path)[0] == resolved != config


def test_folders_that_are_no_runs_are_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no config\.json; make one"):
        read_workdir(tmp_path)
    open_workdir(config, tmp_path)
    (tmp_path / "config.json").write_text('{"name": "a", "model": 3}')
    with pytest.raises(ValueError, match=r"config\.json does not describe an experiment"):
        read_workdir(tmp_path)


def test_files_are_written_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr("focus_jax.workdir.os.replace", fail)
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_the_tokenizer_knows_every_word_of_the_data(config):
    tokenizer = glyph_tokenizer(config.data)
    for source in (data_source(config, "train"), data_source(config, "test", fresh_seed=5)):
        for record in (source[i] for i in range(len(source))):
            for text in record["question"] + record["answer"]:
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_fresh_images_are_as_many_and_others(config):
    stored, fresh = data_source(config, "test"), data_source(config, "test", fresh_seed=0)
    assert len(stored) == len(fresh) == 3
    assert {stored[i]["image"] for i in range(3)}.isdisjoint(fresh[i]["image"] for i in range(3))


def test_stages_read_in_orders_of_their_own(config):
    tokenizer, source = glyph_tokenizer(config.data), data_source(config, "train")
    stage = config.train.stages[0]
    orders = []
    for index in (0, 1, 0):
        batches = iter(make_train_loader(config, {"": source}, tokenizer, stage, index))
        orders.append([next(batches)["index"].tolist() for _ in range(4)])
        batches.close()
    assert orders[0] == orders[2] != orders[1]
    assert sorted(index for batch in orders[0] for index in batch) == list(range(8))


def test_a_stage_may_ask_for_clutter(config):
    tokenizer, source = glyph_tokenizer(config.data), data_source(config, "train")
    stage = replace(config.train.stages[0], clutter=0.75, batch=8)
    batches = iter(make_train_loader(config, {"": source}, tokenizer, stage, 0))
    batch = next(batches)
    batches.close()
    assert 0.6 < batch["cell_filled"].mean() < 0.95
    assert batch["index"].max() < len(source)


@pytest.mark.parametrize("clutter", [0.0, 0.5])
def test_a_stage_may_have_scenes_of_its_own(config, clutter):
    tokenizer, sources = glyph_tokenizer(config.data), {"": data_source(config, "train")}
    asked, easy = config.train.stages[0], replace(config.data.glyphs, groups=1, train=5)
    kind = "shape_of_colour"
    easy = replace(easy, kinds=(kind,), questions=1)
    stage = replace(asked, glyphs=easy, batch=4, questions=1, clutter=clutter)
    batches = iter(make_train_loader(config, sources, tokenizer, stage, 0))
    seen = [next(batches) for _ in range(4)]
    batches.close()
    assert {KINDS[k] for batch in seen for k in batch["kind"].ravel()} == {kind}
    assert {i for batch in seen for i in batch["index"].tolist()} == set(range(5))
    filled = np.concatenate([batch["cell_filled"].sum(-1) for batch in seen])
    assert filled.max() > 2 if clutter else (filled == 2).all()
    # The stage behind it reads the data set.
    batches = iter(make_train_loader(config, sources, tokenizer, replace(asked, batch=8), 1))
    batch = next(batches)
    batches.close()
    assert (batch["cell_filled"].sum(-1) == 4).all() and len(set(batch["index"])) == 8


def test_evaluation_asks_each_question_in_its_own_row(config):
    loader = make_eval_loader(config, data_source(config, "test"), glyph_tokenizer(config.data))
    batches = list(loader)
    valid = np.concatenate([batch["row_valid"][:, 0] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])[valid]
    question = np.concatenate([batch["question"][:, 0] for batch in batches])[valid]
    assert list(zip(index.tolist(), question.tolist(), strict=True)) == [
        (i, q) for i in range(3) for q in range(4)
    ]


def test_a_process_makes_the_rows_that_its_devices_hold(config):
    class Second(Layout):
        """The second of four processes."""

        def rows(self, batch):
            self.check_batch(batch)
            return tuple(range(batch // 4, batch // 2))

    layout = Second(AbstractMesh((2, 2, 1), AXES))
    settings = loader_config(config, 8, 2, seed=1, layout=layout)
    assert (settings.batch, settings.rows) == (8, (2, 3))
    assert loader_config(config, 8, 2, seed=1).rows is None
    said = r"a batch of 6 rows does not divide over 4 devices \(data=2, fsdp=2, tensor=1\)"
    with pytest.raises(ValueError, match=said):
        loader_config(config, 6, 2, seed=1, layout=layout)
    tokenizer, stage = glyph_tokenizer(config.data), replace(config.train.stages[0], batch=4)
    source = data_source(config, "train")
    loaders = [
        make_train_loader(config, {"": source}, tokenizer, stage, 0, x) for x in (layout, None)
    ]
    part, whole = (next(iter(loader))["index"].tolist() for loader in loaders)
    assert part == whole[1:2]
    loaders = [make_eval_loader(config, source, tokenizer, x) for x in (layout, None)]
    part, whole = (next(iter(loader))["index"].tolist() for loader in loaders)
    assert part == whole[2:4]


def test_the_first_process_writes(config, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    folder, tokenizer, resolved = open_workdir(config, tmp_path / "run")
    assert not folder.exists() and resolved.model.decoder.vocab_size == len(tokenizer)


def test_a_workdir_that_cannot_be_written_is_named(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"workdir \S*file/run cannot be written \(.*--workdir"):
        open_workdir(config, tmp_path / "file" / "run")

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("focus_jax.workdir.write_text", full)
    with pytest.raises(ValueError, match=r"cannot be written \(.*No space left.*free its disk"):
        open_workdir(config, tmp_path / "run")
