"""Sources of records: files through TensorFlow Datasets, and examples made on demand."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from focus_jax.data import sources
from focus_jax.data.glyphs import KINDS, GlyphsConfig, make_example, split_seed
from focus_jax.data.images import decode
from focus_jax.data.sources import FreshSource, Glyphs, prepare, source

SMALL = GlyphsConfig(train=12, validation=4, test=5, beside=True, cards=True, tally=2)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(SMALL, 3, folder)
    return folder


def assert_same(record, example):
    np.testing.assert_array_equal(decode(record["image"]), example["image"])
    for name in ("glyph", "colour", "card"):
        np.testing.assert_array_equal(record[name], example[name])
        assert record[name].dtype == np.uint8
    asked = example["questions"]
    assert record["index"] == example["index"]
    assert record["question"] == tuple(q["question"] for q in asked)
    assert record["answer"] == tuple(q["answer"] for q in asked)
    assert [KINDS[k] for k in record["kind"]] == [q["kind"] for q in asked]
    assert record["hops"].tolist() == [q["hops"] for q in asked]
    assert record["evidence"].shape == (len(asked), SMALL.most_cells)
    assert [row[row >= 0].tolist() for row in record["evidence"]] == [
        list(q["cells"]) for q in asked
    ]


@pytest.mark.parametrize(("split", "size"), [("train", 12), ("validation", 4), ("test", 5)])
def test_files_hold_what_was_made(data_dir, split, size):
    rows = source(SMALL, 3, split, data_dir)
    assert len(rows) == size
    # Out of order, as a shuffled reader asks.
    for index in reversed(range(size)):
        assert_same(rows[index], make_example(SMALL, split_seed(3, split), index))


def test_preparing_again_writes_nothing(data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*record*")}
    assert before
    prepare(SMALL, 3, data_dir)
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*record*")}


def test_two_may_prepare_at_once(tmp_path, monkeypatch):
    both, write = threading.Barrier(2, timeout=30), Glyphs.download_and_prepare

    def together(builder):
        both.wait()
        write(builder)
        both.wait()  # Neither is done before both have written.

    monkeypatch.setattr(Glyphs, "download_and_prepare", together)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(source, SMALL, 3, "test", tmp_path) for _ in range(2)]
    for job in jobs:
        assert_same(job.result()[4], make_example(SMALL, split_seed(3, "test"), 4))
    assert [path.name for path in tmp_path.iterdir()] == ["glyphs"]


def test_writing_is_told_in_one_line(tmp_path, capfd, caplog):
    prepare(SMALL, 3, tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("writing data set to ") and err.count("\n") == 1
    prepare(SMALL, 3, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_other_settings_never_read_these_files(data_dir):
    names = {
        str(prepare(config, seed, data_dir).data_path)
        for config, seed in [
            (SMALL, 3),
            (SMALL, 4),
            (dataclasses.replace(SMALL, dense=0.5), 3),
        ]
    }
    assert len(names) == 3


def test_a_changed_generator_never_reads_these_files(data_dir, monkeypatch):
    before = prepare(SMALL, 3, data_dir).data_path

    def changed(config, seed, index):
        example = make_example(config, seed, index)
        example["questions"][0]["question"] += " please"
        return example

    monkeypatch.setattr(sources, "make_example", changed)
    assert prepare(SMALL, 3, data_dir).data_path != before
    assert source(SMALL, 3, "test", data_dir)[0]["question"][0].endswith("please")


def test_fresh_source_has_the_same_form(data_dir):
    fresh, stored = FreshSource(SMALL, 3, 6), source(SMALL, 3, "test", data_dir)
    assert len(fresh) == 6
    assert {k: type(v) for k, v in fresh[0].items()} == {k: type(v) for k, v in stored[0].items()}
    assert_same(fresh[5], make_example(SMALL, split_seed(3, "fresh"), 5))


def test_errors_name_the_mend(data_dir):
    with pytest.raises(ValueError, match="train, validation, test"):
        source(SMALL, 3, "dev", data_dir)
    with pytest.raises(ValueError, match="size=0"):
        FreshSource(SMALL, 3, 0)
    for rows in (FreshSource(SMALL, 3, 6), source(SMALL, 3, "train", data_dir)):
        for index in (-1, len(rows)):
            with pytest.raises(IndexError, match="outside"):
                rows[index]
