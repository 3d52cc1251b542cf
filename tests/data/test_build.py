"""Data sets that are built: their records, resuming, and what stands in the way of a build."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from focus_jax.cli.data import main
from focus_jax.data import build as build_module
from focus_jax.data.build import BuildConfig, build
from focus_jax.data.built import open_built
from focus_jax.data.image_store import open_stores
from focus_jax.data.images import CorruptImage
from focus_jax.data.row_files import JsonRows
from focus_jax.data.shard import checked_size
from tests.data.llava_made import lying_jpeg, lying_png, photo, row, talk
from tests.data.test_image_store import tar

SIZES = [(24, 16), (10, 40), (33, 33), (64, 8)]
PHOTOS = {f"im/{i}.png": photo(*SIZES[i % 4], seed=i, form="PNG") for i in range(8)}


def rows_of_all_kinds():
    """22 rows, of which 4 are bad: (row, kind of what is wrong)."""
    rows = [(row(f"r{i}", f"im/{i % 8}.png"), None) for i in range(12)]
    rows += [(row(f"é{i}", None, "no image", "a" * 50 * i), None) for i in range(4)]
    both = row("two", ["im/1.png", "im/2.png"], "<image> or <image>?", "one", "why?", "so")
    rows += [(both, None), (row("trail", None, "q", "a", "q2"), None)]
    bad = [
        (row("gone", "im/none.png"), "missing image"),
        (row("cut", "im/cut.jpg"), "corrupt image"),
    ]
    several = row("n", ["im/1.png", "im/2.png"], "<image>", "a")
    bad += [({"id": "x", "conversations": 3}, "shape"), (several, "markers")]
    for place, wrong in zip((0, 5, 6, 21), bad, strict=True):
        rows.insert(place, wrong)
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with rows.json, more.jsonl and images."""
    root = tmp_path_factory.mktemp("made")
    (root / "images/im").mkdir(parents=True)
    for name, data in PHOTOS.items():
        (root / "images" / name).write_bytes(data)
    (root / "images/im/cut.jpg").write_bytes(photo(90, 90)[:2000])
    rows = [r for r, _ in rows_of_all_kinds()]
    (root / "rows.json").write_text(json.dumps(rows[:15], indent=1))
    (root / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[15:]))
    return root


def construct(made, out, progress=None, **settings):
    rows = [JsonRows(made / "rows.json"), JsonRows(made / "more.jsonl")]
    cfg = BuildConfig(**{"shards": 4, "max_bad_share": 0.2} | settings)
    return build(rows, open_stores([made / "images"]), out, cfg, progress)


def contents(folder):
    """Checksums of all files, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(made):
    construct(made, made / "built")
    return made / "built"


def test_records_are_the_rows_in_their_order(built):
    good = [(n, r) for n, (r, wrong) in enumerate(rows_of_all_kinds()) if wrong is None]
    examples = tfds.builder_from_directory(built).as_data_source("train")
    data = open_built(built, verify=True)
    assert len(data) == len(examples) == len(good) == 18
    assert data.rows.tolist() == [n for n, _ in good]
    for i, (_, asked) in enumerate(good):
        names = asked.get("image", [])
        names = [names] if isinstance(names, str) else names
        texts = [turn["value"] for turn in asked["conversations"]]
        # The question at the end that nobody answered is not there.
        turns = tuple(zip(texts[::2], texts[1::2], strict=False))
        assert data[i] == (asked["id"], tuple(PHOTOS[name] for name in names), turns)
        assert data.texts(i) == turns
        largest = max((SIZES[int(n[3]) % 4] for n in names), key=np.prod, default=(0, 0))
        assert data.sizes[i].tolist() == [len(names), *largest]
        assert data.characters[i] == sum(len(text) for turn in turns for text in turn)
        assert examples[i]["id"].decode() == asked["id"]
    with pytest.raises(IndexError, match="outside a data set of 18"):
        data[18]


def test_the_split_of_texts_holds_no_images(built):
    texts = tfds.builder_from_directory(built).as_data_source("texts")
    assert len(texts) == 18
    assert all(len(record["images"]) == 0 for record in texts)


def test_bad_rows_are_listed_with_file_and_line(built, made):
    listed = [json.loads(line) for line in (built / "bad_rows.jsonl").read_text().splitlines()]
    expected = [(n, r["id"], wrong) for n, (r, wrong) in enumerate(rows_of_all_kinds()) if wrong]
    lines = (made / "rows.json").read_text().split("\n")
    for found, (number, name, kind) in zip(listed, expected, strict=True):
        assert (found["id"], found["kind"]) == (name, kind)
        if number < 15:
            assert found["file"] == str(made / "rows.json")
            assert found["row"] == number + 1
            # Its line is that of the row's bracket, the one before its id.
            assert f'"id": "{name}"' in lines[found["line"]]
        else:
            assert found["file"] == str(made / "more.jsonl")
            assert found["row"] == found["line"] == number - 15 + 1
    about = open_built(built).about()
    assert (about["rows"], about["kept"], about["bad"], about["images"]) == (22, 18, 4, 14)
    assert about["kinds"] == {
        "corrupt image": 1, "markers": 1, "missing image": 1, "shape": 1,
    }  # fmt: skip


def test_building_again_does_nothing(built, made):
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    report = construct(made, built)
    assert (report.rows, report.kept, report.shards) == (22, 18, 4)
    assert before == {path: path.stat().st_mtime_ns for path in built.iterdir()}


def test_the_fingerprint_is_of_the_contents(built, made, tmp_path):
    again = tmp_path / "again"
    construct(made, again)
    assert contents(again) == contents(built)
    (tmp_path / "rows.json").write_text(json.dumps([r for r, _ in rows_of_all_kinds()][:14]))
    cfg = BuildConfig(shards=4, max_bad_share=0.5)
    rows = [JsonRows(tmp_path / "rows.json")]
    build(rows, open_stores([made / "images"]), tmp_path / "other", cfg)
    prints = [open_built(folder).fingerprint for folder in (built, again, tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.data.test_build import construct
    root, out, after, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    def progress(state):
        if state.done >= after:
            os.kill(os.getpid(), signal.SIGKILL)
    if __name__ == "__main__":
        construct(root, out, progress, workers=workers)
"""


def killed(made, out, after, workers, tmp_path):
    """Start a build in a process of its own, which is killed behind that many rows."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(KILLED))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MARK": str(tmp_path),
    }
    command = [sys.executable, program, made, out, str(after), str(workers)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == -signal.SIGKILL, found.stderr


def resumes_to_the_same(made, built, out):
    with pytest.raises(FileNotFoundError, match=r"not finished.*run the same command again"):
        open_built(out)
    kept = {path: path.stat().st_ino for path in out.glob("*array_record*")}
    whole = {path.stem for path in (out / ".building").glob("*.npz")}
    construct(made, out)
    assert contents(out) == contents(built)
    # What was whole was not written again.
    for path, inode in kept.items():
        if path.name.split("-")[-3] in whole:
            assert path.stat().st_ino == inode
    return whole


def test_a_killed_build_resumes_to_the_same_bytes(made, built, tmp_path):
    killed(made, tmp_path / "out", 13, 1, tmp_path)
    assert len(list((tmp_path / "out/.building").glob("*array_record*"))) == 2  # half a shard
    assert resumes_to_the_same(made, built, tmp_path / "out") == {"00000", "00001"}


@pytest.mark.slow
@pytest.mark.parametrize(("after", "workers"), [(1, 1), (5, 1), (22, 1), (1, 2), (9, 2), (22, 2)])
def test_killed_anywhere(made, built, tmp_path, after, workers):
    killed(made, tmp_path / "out", after, workers, tmp_path)
    resumes_to_the_same(made, built, tmp_path / "out")


@pytest.mark.slow
def test_workers_end_with_a_killed_build(made, tmp_path):
    killed(made, tmp_path / "out", 1, 2, tmp_path)
    # The folder's name is in the environment of all processes of that build.
    mark, end = f"MARK={tmp_path}".encode(), time.monotonic() + 20
    while left := [path for path in Path("/proc").glob("[0-9]*/environ") if holds(path, mark)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def holds(path, mark):
    try:
        return mark in path.read_bytes()
    except OSError:
        return False  # it ended, or is another's


def test_several_processes_write_what_one_writes(made, built, tmp_path):
    states = []
    construct(made, tmp_path / "out", states.append, workers=2)
    assert contents(tmp_path / "out") == contents(built)
    assert states[-1] == (22, 22, 4)
    assert states == sorted(states)


@pytest.mark.parametrize("last", ["index.npz", "build.json"])
def test_stopped_before_the_end(made, built, tmp_path, monkeypatch, last):
    write = build_module.write_whole

    def full(path, *rest):
        if path.name == last:
            raise OSError("no space left")
        write(path, *rest)

    monkeypatch.setattr(build_module, "write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        construct(made, tmp_path / "out")
    monkeypatch.undo()
    assert len(resumes_to_the_same(made, built, tmp_path / "out")) == 4


def test_killed_when_all_was_written(made, built, tmp_path):
    construct(made, tmp_path / "out")
    (tmp_path / "out/.building").mkdir()
    assert len(open_built(tmp_path / "out")) == 18
    construct(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(built)
    assert not (tmp_path / "out/.building").exists()


def test_a_full_disk(made, built, tmp_path):
    out = tmp_path / "out"
    (out / ".building").mkdir(parents=True)
    full = out / f".building/llava-train.array_record-00002-of-00004.{os.getpid()}"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"shard 2 of .* cannot be written: .*No space left"):
        construct(made, out)
    full.unlink()
    assert resumes_to_the_same(made, built, out) == {"00000", "00001"}


def test_a_shard_that_was_damaged_is_written_again(made, built, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        construct(made, tmp_path / "out")
    monkeypatch.undo()
    first, second, *_ = sorted((tmp_path / "out").glob("*array_record*"))
    first.write_bytes(first.read_bytes()[:-1] + b"!")
    second.unlink()
    (tmp_path / "out/.building/00003.npz").write_bytes(b"PK")
    construct(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(built)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"shards": 3}, "shards was 4, is 3"),
        ({"name": "other"}, "name was 'llava', is 'other'"),
        ({"max_pixels": 999}, "max_pixels was 89478485, is 999"),
        ({"verify_images": False}, "verify_images was True, is False"),
    ],
)
def test_another_build_in_the_same_folder(made, built, change, difference):
    before = contents(built)
    with pytest.raises(ValueError, match=f"belongs to another build: {difference}; give another"):
        construct(made, built, **change)
    assert contents(built) == before


def test_other_sources_in_the_same_folder(made, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        construct(made, tmp_path / "out", stop)
    rows, cfg = [JsonRows(made / "more.jsonl")], BuildConfig(shards=4, max_bad_share=0.2)
    images = open_stores([made / "images"])
    with pytest.raises(ValueError, match=r"sources\.rows\.0\.file was 'rows\.json', is 'more\.js"):
        build(rows, images, tmp_path / "out", cfg)
    tar(tmp_path / "im.tar", PHOTOS)
    both = [JsonRows(made / "rows.json"), JsonRows(made / "more.jsonl")]
    with pytest.raises(ValueError, match=r"images\.stores\.0\.folder was '.*', is None"):
        build(both, open_stores([tmp_path / "im.tar"]), tmp_path / "out", cfg)


def test_two_builds_at_once(made, tmp_path):
    told = []

    def other(_):
        if not told:
            told.append("once")
            with pytest.raises(ValueError, match="another process is building"):
                construct(made, tmp_path / "out")

    construct(made, tmp_path / "out", other)
    assert told


def test_too_many_bad_rows(made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"4 of 22 rows are bad, more than .* 0\.15 .*first: .*none\.png"
    ):
        construct(made, out, max_bad_share=0.15)
    assert len((out / "bad_rows.jsonl").read_text().splitlines()) == 4
    with pytest.raises(FileNotFoundError, match="not finished"):
        open_built(out)
    # Told as soon as it is certain, and what was built serves when more are allowed.
    with pytest.raises(ValueError, match="1 of 22 rows are bad after 5 of them"):
        construct(made, out, max_bad_share=0.01)
    assert construct(made, out).kept == 18
    with pytest.raises(ValueError, match="4 of 22 rows are bad"):
        construct(made, out, max_bad_share=0.15)


def test_nothing_to_build(made, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match="no rows to build from"):
        build([JsonRows(tmp_path / "rows.json")], open_stores([]), tmp_path / "out")
    (tmp_path / "rows.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="none of 2 rows is good"):
        build(
            [JsonRows(tmp_path / "rows.json")],
            open_stores([]),
            tmp_path / "out",
            BuildConfig(max_bad_share=1),
        )
    with pytest.raises(ValueError, match="holds files that no build made"):
        construct(made, made / "images")


def test_shards_without_a_good_row(tmp_path):
    rows = [{}, {}, row("a"), {}, row("b"), {}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = BuildConfig(shards=6, max_bad_share=0.9)
    build([JsonRows(tmp_path / "rows.jsonl")], open_stores([]), tmp_path / "out", cfg)
    data = open_built(tmp_path / "out")
    assert [data[i].id for i in range(len(data))] == ["a", "b"]
    assert data.texts(1) == (("what is it?", "this is b"),)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda d: (d / "build.json").unlink(), FileNotFoundError, "has no build.json; make one"),
        (lambda d: (d / "index.npz").unlink(), ValueError, r"index\.npz is missing: copy it again"),
        (lambda d: (d / "build.json").write_text("{"), ValueError, r"build\.json is damaged"),
        (
            lambda d: os.truncate(d / "llava-train.array_record-00001-of-00004", 99),
            ValueError,
            r"00001-of-00004 has 99 bytes, \d+ were written",
        ),
    ],
)
def test_a_folder_that_is_not_whole(made, tmp_path, change, error, told):
    construct(made, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(error, match=told):
        open_built(tmp_path / "out")


def test_verifying_finds_a_changed_byte(made, tmp_path):
    construct(made, tmp_path / "out")
    path = next((tmp_path / "out").glob("*texts*-00002-*"))
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    path.write_bytes(data)
    open_built(tmp_path / "out")
    with pytest.raises(ValueError, match="00002-of-00004 is damaged: its checksum"):
        open_built(tmp_path / "out", verify=True)


@pytest.mark.parametrize(
    "settings",
    [{"shards": -1}, {"workers": 0}, {"max_bad_share": 2}, {"max_pixels": 0}, {"name": "a-b"}],
)
def test_settings_that_cannot_be(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}=.*: give"):
        BuildConfig(**settings)


BROKEN = {
    "half a JPEG": photo()[:300],
    "half a PNG": photo(form="PNG")[:300],
    "nothing": b"",
    "text": b"<html>404</html>",
    "a huge PNG": lying_png(60_000, 60_000),
    "a huge JPEG": lying_jpeg(60_000, 60_000),
    "a large PNG": lying_png(9_500, 9_500),
    "no pixels": lying_png(0, 16),
    # PIL would start a program for it.
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_images_that_cannot_be_used(name):
    """What is told of them is the same in every process: it goes into a file with a checksum."""
    with pytest.raises(CorruptImage, match=r"^'a\.jpg' of \d+ bytes: .") as error:
        checked_size(BROKEN[name], "a.jpg", 89_478_485, decode=True)
    assert " at 0x" not in str(error.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_that_can(form):
    assert checked_size(photo(20, 30, form=form), "a", 600, decode=True) == (20, 30)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_headers_alone_are_quicker_and_see_less():
    assert checked_size(BROKEN["half a PNG"], "a", 1000, decode=False) == (24, 16)


def test_the_command(made, built, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--json", str(made / "rows.json"), str(made / "more.jsonl"), "--out", str(out)]
    flags += ["--images", str(made / "images"), "--shards", "4", "--workers", "1"]
    assert main(["build", *flags]) == 1
    assert "rows are bad" in capsys.readouterr().err
    assert main(["build", *flags, "--max-bad-share", "0.2"]) == 0
    printed = capsys.readouterr()
    table = dict(
        map(str.strip, line.strip("|").split("|")) for line in printed.out.strip().split("\n")
    )
    assert table["rows"] == "22"
    assert table["- corrupt image"] == "1"
    assert "build 22/22" in printed.err
    assert contents(out) == contents(built)


def test_the_command_on_shards(tmp_path, capsys):
    files = {}
    for i in range(4):
        said = {"conversations": talk("<image>what?", f"answer {i}")}
        files |= {f"{i}.jpg": photo(20 + i), f"{i}.json": json.dumps(said).encode()}
    (tmp_path / "shards").mkdir()
    tar(tmp_path / "shards/s-0.tar", {n: files[n] for n in ("0.jpg", "0.json", "1.jpg", "1.json")})
    tar(tmp_path / "shards/s-1.tar", {n: files[n] for n in ("2.jpg", "2.json", "3.jpg", "3.json")})
    flags = ["--webdataset", str(tmp_path / "shards"), "--out", str(tmp_path / "out")]
    assert main(["build", *flags, "--workers", "1", "--name", "shards"]) == 0
    data = open_built(tmp_path / "out")
    for i in range(4):
        asked = (("<image>\nwhat?", f"answer {i}"),)
        assert data[i] == (str(i), (files[f"{i}.jpg"],), asked)
    assert main(["build", "--out", str(tmp_path / "o")]) == 1
    assert (
        "no rows: give --json FILE, --parquet FILE or --webdataset DIR" in capsys.readouterr().err
    )
