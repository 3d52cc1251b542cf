"""Readers of benchmarks' files: rows as they stand, errors that name file and line."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from focus_jax.evaluate import files
from tests.evaluate.miniatures_open import encoded, put_parquet


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_skips_empty_lines_and_names_broken_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": "x\\u2028y"}\n\n{"a": "caf\u00e9\u2028"}\n')
    assert files.read_jsonl(path) == [{"a": "x\u2028y"}, {"a": "caf\u00e9\u2028"}]
    with pytest.raises(ValueError, match=r"a.jsonl line 2 is no JSON"):
        files.read_jsonl(write(path, '{"a": 1}\n{"a": \n'))
    with pytest.raises(ValueError, match=r"line 1 holds list"):
        files.read_jsonl(write(path, "[1]"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no UTF-8"):
        files.read_jsonl(path)


def test_rows_of_json_under_a_key_or_bare(tmp_path):
    rows = [{"a": 1}]
    assert files.read_rows(write(tmp_path / "a.json", json.dumps({"data": rows})), "data") == rows
    assert files.read_rows(write(tmp_path / "b.json", json.dumps(rows)), "data") == rows
    with pytest.raises(ValueError, match='list of objects under "data"'):
        files.read_rows(write(tmp_path / "c.json", json.dumps({"rows": rows})), "data")
    with pytest.raises(ValueError, match=r"no JSON \(line 2"):
        files.read_json(write(tmp_path / "d.json", '{"a":\n oh}'))
    for name, place in (("a.json", "a.json row 0"), ("b.json", "b.json row 0")):
        with pytest.raises(ValueError, match=f'{place} has no "b"; it has a$'):
            files.read_rows(tmp_path / name, "data")[0]["b"]


def test_objects_by_their_ids_name_themselves(tmp_path):
    path = write(tmp_path / "a.json", '{"x": {"a": {"b": 1}}, "y": {}}')
    found = files.read_keyed(path)
    assert found == {"x": {"a": {"b": 1}}, "y": {}}
    for lookup, message in (
        (lambda: found["z"], 'a.json has no "z"; it has x, y$'),
        (lambda: found["y"]["a"], 'a.json: y has no "a"; it has nothing$'),
        (lambda: found["x"]["a"]["c"], 'a.json has no "c"; it has b$'),
    ):
        with pytest.raises(ValueError, match=message):
            lookup()
    with pytest.raises(ValueError, match="holds list, not an object"):
        files.read_object(write(path, "[]"))
    with pytest.raises(ValueError, match="objects by their ids"):
        files.read_keyed(write(path, '{"x": 1}'))
    many = files.named({str(n): n for n in range(30)}, "here")
    with pytest.raises(ValueError, match=r"10, 11, \.\.\.$"):
        many["z"]


def test_windows_files_are_read_alike(tmp_path):
    """A byte order mark, and lines that end in two characters."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "x"}\r\n\r\n{"a": "y"}\r\n')
    assert files.read_jsonl(tmp_path / "a.jsonl") == [{"a": "x"}, {"a": "y"}]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[\r\n{"a": "x"}\r\n]\r\n')
    assert files.read_rows(tmp_path / "a.json") == [{"a": "x"}]
    (tmp_path / "a.tsv").write_bytes(b'\xef\xbb\xbfa\tb\r\n1\t"two\r\nlines"\r\n')
    (row,) = files.read_table(tmp_path / "a.tsv")
    assert row == {"a": "1", "b": "two\r\nlines"} and row.where.endswith("a.tsv line 3")


def test_tables_keep_cells_as_they_stand(tmp_path):
    long = "x" * 200_000  # above csv's usual limit: images lie in cells
    text = f'index\tquestion\timage\n1\t"two\nlines"\t{long}\n2\t3.0\t\n'
    rows = files.read_table(write(tmp_path / "a.tsv", text))
    assert rows == [
        {"index": "1", "question": "two\nlines", "image": long},
        {"index": "2", "question": "3.0", "image": ""},
    ]
    assert files.read_table(write(tmp_path / "a.csv", "a,b\n1,2\n")) == [{"a": "1", "b": "2"}]
    for row in ("1\n", "1,2,3\n"):
        with pytest.raises(ValueError, match="another number of cells"):
            files.read_table(write(tmp_path / "a.csv", "a,b\n" + row))


def test_images_are_read_when_asked_for_and_by_row_group(tmp_path, monkeypatch):
    paths = []
    for part in range(2):
        rows = [{"id": 5 * part + row, "note": None} for row in range(5)]
        images = range(5 * part, 5 * part + 5)
        paths.append(tmp_path / f"test-{part:05}-of-00002.parquet")
        put_parquet(paths[-1], rows, images)
    rows = list(files.read_parquet(paths, ("id", "missing?")))
    assert [row["id"] for row in rows] == [row["row"] for row in rows] == list(range(10))
    assert {row["missing"] for row in rows} == {None}
    read = []
    whole = files.open_parquet
    monkeypatch.setattr(files, "open_parquet", lambda path: read.append(path) or whole(path))
    files.image_column.cache_clear()
    assert [row["image"]() for row in rows] == [encoded(number) for number in range(10)]
    assert len(read) == 6  # groups of two rows: 2 x 3, not ten times


def test_threads_read_a_row_group_once(tmp_path, monkeypatch):
    path = tmp_path / "test-00000-of-00001.parquet"
    put_parquet(path, [{"id": number} for number in range(4)], range(4))
    rows, read, whole = list(files.read_parquet([path], ("id",))), [], files.open_parquet

    def slow(path):
        read.append(path)
        time.sleep(0.05)
        return whole(path)

    monkeypatch.setattr(files, "open_parquet", slow)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda row: row["image"](), rows))
    assert images == [encoded(number) for number in range(4)]
    assert len(read) == 2  # two rows a group


def test_a_shard_that_is_broken_lacking_or_missing_is_named(tmp_path):
    path = tmp_path / "data" / "test-00000-of-00002.parquet"
    put_parquet(path, [{"id": 1}], [0])
    with pytest.raises(FileNotFoundError, match="1 of the 2 files of test"):
        files.shards(tmp_path, "test")
    with pytest.raises(ValueError, match='no column "answer"; it has id, image'):
        list(files.read_parquet([path], ("answer",)))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no whole parquet file"):
        list(files.read_parquet([path], ("id",)))
    pq.write_table(pa.table({"image": pa.array([{"bytes": None}])}), path)
    (row,) = files.read_parquet([path], ())
    with pytest.raises(ValueError, match="row 0 of row group 0 has no image"):
        row["image"]()


def test_shards_lie_where_the_hub_puts_them(tmp_path):
    assert files.shards(tmp_path, "test") == []
    deep = tmp_path / "snapshots" / "0a1b" / "data" / "test-00000-of-00001-8f.parquet"
    put_parquet(deep, [{"id": 1}])
    assert files.shards(tmp_path, "test") == [deep]
    later = tmp_path / "snapshots" / "2c3d" / "data" / deep.name
    put_parquet(later, [{"id": 1}])
    assert files.shards(tmp_path, "test") == [later]
    own = tmp_path / "Config" / "test-00000-of-00001.parquet"
    put_parquet(own, [{"id": 1}])
    assert files.shards(tmp_path, "test", "Config") == [own]


def test_images_by_name_with_and_without_their_suffix(tmp_path):
    (tmp_path / "a.png").touch()
    assert files.image_at(tmp_path, "a") == tmp_path / "a.png"
    assert files.image_at(tmp_path, "b") == tmp_path / "b.jpg"
    assert files.image_at(tmp_path, "c.v2.JPG") == tmp_path / "c.v2.JPG"


def test_question_files_of_llava(tmp_path):
    path = write(tmp_path / "q.jsonl", '{"question_id": 7, "text": "Why?"}\n')
    assert files.read_questions(path) == [files.Question("7", "", "Why?", "")]
    with pytest.raises(ValueError, match='line 1 has no "text"'):
        files.read_questions(write(path, '{"question_id": 7}'))


def test_copies_of_an_id_are_marked():
    assert files.unique(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]


@pytest.mark.parametrize("value", ["null", "7"])
def test_a_question_that_is_no_text_is_named_with_its_line(tmp_path, value):
    path = write(tmp_path / "q.jsonl", f'{{"text": "what?"}}\n{{"text": {value}}}\n')
    with pytest.raises(ValueError, match=r'q\.jsonl.*2.*"text" is'):
        files.read_jsonl(path)
