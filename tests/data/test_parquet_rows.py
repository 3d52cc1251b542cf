"""Rows with their images in parquet files, as LLaVA-NeXT-Data is published."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from focus_jax.cli.data import main
from focus_jax.data.built import open_built
from focus_jax.data.image_store import MissingImage
from focus_jax.data.parquet_rows import ParquetRows
from tests.data.llava_made import photo, talk

PHOTOS = [photo(20 + i, 16, seed=i) for i in range(6)]


def image(encoded=None, path=None):
    return {"bytes": encoded, "path": path}


def rows():
    """Eight rows, of which the fourth and the sixth are bad."""
    asked = talk("what?\n<image>", "a cat")
    return [
        {"id": "0", "conversations": asked, "image": image(PHOTOS[0], "a/0.jpg")},
        {"id": "1", "conversations": talk("say <image>", "b"), "image": None},
        {"id": "2", "conversations": asked, "image": image(PHOTOS[1])},
        {"id": "3", "conversations": asked, "image": image(PHOTOS[2][:100])},
        {"id": None, "conversations": asked, "image": image(None, "there/4.jpg")},
        {"id": "5", "conversations": asked, "image": image(None, "nowhere.jpg")},
        {"id": "6", "conversations": talk("hello", "猫"), "image": None},
        {"id": "7", "conversations": asked, "image": image(PHOTOS[5])},
    ]


def write(path, found, **settings):
    found = [{**row, "data_source": "made"} for row in found]
    pq.write_table(pa.Table.from_pylist(found), path, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("parquet")
    (out / "data").mkdir()
    write(out / "data/train-0.parquet", rows()[:5], row_group_size=2)
    write(out / "data/train-1.parquet", rows()[5:])
    (out / "images/there").mkdir(parents=True)
    (out / "images/there/4.jpg").write_bytes(PHOTOS[4])
    return out


def build(folder, out, *more):
    flags = ["--parquet", str(folder / "data"), "--images", str(folder / "images")]
    flags += ["--out", str(out), "--workers", "1", "--max-bad-share", "0.3"]
    return main(["build", *flags, *more])


def test_rows_become_a_data_set(folder, tmp_path):
    assert build(folder, tmp_path / "out", "--shards", "3") == 0
    data = open_built(tmp_path / "out")
    asked = (("<image>\nwhat?", "a cat"),)
    assert [data[i] for i in range(6)] == [
        ("0", (PHOTOS[0],), asked), ("1", (), (("say <image>", "b"),)),
        ("2", (PHOTOS[1],), asked), ("5", (PHOTOS[4],), asked),
        ("6", (), (("hello", "猫"),)), ("7", (PHOTOS[5],), asked),
    ]  # fmt: skip
    bad = [json.loads(line) for line in (tmp_path / "out/bad_rows.jsonl").open()]
    assert [(row["file"].rpartition("/")[2], row["row"], row["kind"]) for row in bad] == [
        ("train-0.parquet", 4, "corrupt image"), ("train-1.parquet", 1, "missing image"),
    ]  # fmt: skip
    # The same command again finds it, other files do not.
    assert build(folder, tmp_path / "out", "--shards", "3") == 0
    assert build(folder, tmp_path / "out", "--json", str(tmp_path / "no")) == 1


def test_they_can_be_looked_at_before_they_are_built(folder, tmp_path, capsys):
    flags = ["--parquet", str(folder / "data/train-0.parquet"), "--out", str(tmp_path)]
    assert main(["check", *flags, "--sample", "0"]) == 0
    # The store of photos was not given: one more is missing.
    assert "2 rows are bad (1 corrupt image, 1 missing image)" in capsys.readouterr().out


def test_random_access_and_other_processes(folder):
    made = ParquetRows(sorted((folder / "data").glob("*")))
    again = pickle.loads(pickle.dumps(made))
    assert len(made) == 8
    for index in (7, 0, 4, 3, 5):
        assert again[index] == made[index]
        assert str(made[index].place).endswith(f"-{index // 5}.parquet (row {index % 5 + 1})")
    assert made.read(made[2].beside[0]) == PHOTOS[1]
    for name in ("train-0.parquet/1/0", "train-0.parquet/9/0", "train-0.parquet/0/7", "a.jpg"):
        with pytest.raises(MissingImage):
            made.read(name)


def test_several_images_and_what_is_not_utf8(tmp_path):
    both = {"id": "a", "conversations": talk("<image> <image>", "b")}
    write(tmp_path / "a.parquet", [{**both, "image": [image(PHOTOS[0]), image(PHOTOS[1])]}])
    made = ParquetRows([tmp_path / "a.parquet"])
    assert [made.read(name) for name in made[0].beside] == PHOTOS[:2]
    broken = pa.array([b"\xff\xfe"]).view(pa.string())
    table = pa.table({"id": broken, "conversations": pa.array([talk("a", "b")])})
    pq.write_table(table, tmp_path / "b.parquet")
    assert ParquetRows([tmp_path / "b.parquet"])[0].raw == b"\xff"


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no rows at \S*none.parquet"):
        ParquetRows([tmp_path / "none.parquet"])
    (tmp_path / "a.parquet").write_bytes(b"PAR1, cut off")
    with pytest.raises(ValueError, match=r"a.parquet is no whole parquet file .* fetch it again"):
        ParquetRows([tmp_path / "a.parquet"])
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"no column 'conversations', but question"):
        ParquetRows([tmp_path / "b.parquet"])
    write(tmp_path / "c.parquet", rows()[:3], compression="none")
    data = bytearray((tmp_path / "c.parquet").read_bytes())
    data[4:60] = bytes(56)
    (tmp_path / "c.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"c.parquet: its group 1 of rows cannot be read"):
        ParquetRows([tmp_path / "c.parquet"])[0]
