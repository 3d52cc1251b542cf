"""Image stores: every kind hands out the same files, and nothing that is not its own."""

import io
import os
import pickle
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from focus_jax.data import image_store
from focus_jax.data.image_store import MissingImage, open_store, open_stores
from focus_jax.data.row_files import open_shard_rows

FILES = {f"coco/train/{i}.jpg": os.urandom(200 + 700 * i) for i in range(6)} | {
    "é über.png": b"\0" * 9,
    "long/" + "n" * 150 + ".jpg": b"long",
}


def tar(path, files, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def shards(path, files):
    path.mkdir()
    names = sorted(files)
    for number in range(3):
        tar(path / f"shard-{number:05}.tar", {name: files[name] for name in names[number::3]})
    return path


MAKE = {
    "folder": lambda root: folder(root / "files", FILES),
    "zip": lambda root: zipped(root / "files.zip", FILES),
    "tar": lambda root: tar(root / "files.tar", FILES),
    "gnu tar": lambda root: tar(root / "files.tar", FILES, tarfile.GNU_FORMAT),
    "tar of ./": lambda root: tar(root / "f.tar", {f"./{n}": d for n, d in FILES.items()}),
    "shards": lambda root: shards(root / "shards", FILES),
    "zip with another ending": lambda root: zipped(root / "files.bin", FILES),
}


@pytest.fixture(params=MAKE)
def store(request, tmp_path):
    return open_store(MAKE[request.param](tmp_path))


def test_every_kind_of_store_has_the_files(store):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.read, [*FILES] * 5)) == [*FILES.values()] * 5
    elsewhere = pickle.loads(pickle.dumps(store))
    assert [elsewhere.read(name) for name in FILES] == [*FILES.values()]
    assert store.read("./coco//train/1.jpg") == FILES["coco/train/1.jpg"]
    assert elsewhere.about() == store.about()


@pytest.mark.parametrize(
    "name",
    ["coco/train/77.jpg", "coco/train", "", ".", "nothing", "x" * 5000, "a\0b", "coco/1\n\x1b[2J"],
)
def test_what_is_not_there_is_named(store, name):
    with pytest.raises(MissingImage) as error:
        store.read(name)
    told = str(error.value)
    assert repr(name)[:40] in told
    assert len(told) < 900
    assert told.isprintable()


@pytest.mark.parametrize("name", ["../secret", "coco/../../secret", "/etc/passwd", "..", "//a"])
def test_no_name_leads_out(store, name, tmp_path):
    (tmp_path / "secret").write_text("s")
    with pytest.raises(MissingImage, match="leads out of the images"):
        store.read(name)


def test_archives_that_hold_names_from_outside(tmp_path):
    for make in (tar, zipped):
        path = make(tmp_path / "a", {"../../out.jpg": b"x", "/abs.jpg": b"y", "in.jpg": b"z"})
        store = open_store(path)
        assert store.read("in.jpg") == b"z"
        for name in ("../../out.jpg", "/abs.jpg"):
            with pytest.raises(MissingImage, match="leads out"):
                store.read(name)


def test_a_folder_hands_out_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # would be waited for without end
    (tmp_path / "away.jpg").symlink_to("/nowhere/1.jpg")
    (tmp_path / "linked").symlink_to(folder(tmp_path / "other", {"1.jpg": b"1"}))
    store = open_store(tmp_path)
    assert store.read("linked/1.jpg") == b"1"
    for name, why in [("pipe.jpg", "is not a file"), ("away.jpg", "No such file")]:
        with pytest.raises(MissingImage, match=why):
            store.read(name)


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "MAX_BYTES", 100)
    files = {"small.jpg": b"s" * 100, "large.jpg": b"l" * 101}
    for make in (folder, zipped, tar):
        root = tmp_path / make.__name__
        root.mkdir()
        store = open_store(make(root / "files", files) if make is not folder else make(root, files))
        assert len(store.read("small.jpg")) == 100
        with pytest.raises(MissingImage, match="101 bytes, more than 100"):
            store.read("large.jpg")


def test_damage_in_a_zip_is_one_missing_image(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.jpg": b"a" * 99, "b.jpg": os.urandom(500)})
    data = bytearray(path.read_bytes())
    at = data.index(b"b.jpg") + 100
    data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data)
    store = open_store(path)
    assert store.read("a.jpg") == b"a" * 99
    with pytest.raises(MissingImage, match=r"'b\.jpg' in .*a\.zip"):
        store.read("b.jpg")


def test_archives_that_cannot_be_opened(tmp_path):
    whole = tar(tmp_path / "a.tar", FILES).read_bytes()
    cut, short, middle, packed = (
        tmp_path / name for name in ("cut.tar", "short.tar", "middle.tar", "p.tar.gz")
    )
    cut.write_bytes(whole[:600])
    short.write_bytes(whole[:1400])
    # The second header; the first file begins behind its own and takes a block.
    middle.write_bytes(whole[:1024] + b"garbage!" * 64 + whole[1536:])
    with tarfile.open(packed, "w:gz"):
        pass
    bad_zip = zipped(tmp_path / "a.zip", FILES)
    bad_zip.write_bytes(bad_zip.read_bytes()[:-30])
    for path, why in [
        (cut, r"cut\.tar is not a whole tar"),
        (short, r"short\.tar is damaged: byte 1024"),
        (middle, r"middle\.tar is damaged"),
        (packed, r"it is compressed, unpack it with `gunzip p\.tar\.gz`"),
        (bad_zip, "not a whole zip"),
        (Path(__file__), "not a whole tar"),
    ]:
        with pytest.raises(ValueError, match=why):
            open_store(path)
    with pytest.raises(FileNotFoundError, match=r"no images at .*none: give a folder"):
        open_store(tmp_path / "none")


@pytest.mark.parametrize("make", [tar, zipped])
def test_archives_with_changed_bytes_are_read_or_refused(make, tmp_path):
    draw, read, refused = random.Random(0), 0, 0
    whole = make(tmp_path / "whole", {f"{i}.jpg": b"data" * 30 for i in range(4)}).read_bytes()
    for case in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 4])):
            data[draw.randrange(len(data))] = draw.choice(b"\x00\xff0179xgLKS")
        path = tmp_path / f"{case}.{make.__name__[:3]}"
        path.write_bytes(data[: draw.choice([None, draw.randrange(len(data))])])
        try:
            store = open_store(path)
            for i in range(4):
                assert len(store.read(f"{i}.jpg")) <= len(whole)
            read += 1
        except (ValueError, MissingImage) as error:
            assert str(path) in str(error)
            refused += 1
    assert min(read, refused) > 20


def test_a_tar_that_shrinks_is_told(tmp_path):
    path = tar(tmp_path / "a.tar", {"a.jpg": b"a" * 5000})
    store = open_store(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MissingImage, match="bytes too early"):
        store.read("a.jpg")


def test_several_stores_are_asked_in_order(tmp_path):
    first = zipped(tmp_path / "1.zip", {"a": b"first", "b": b"b"})
    second = tar(tmp_path / "2.tar", {"a": b"second", "c": b"c"})
    both = open_stores([first, second])
    assert [both.read(name) for name in "abc"] == [b"first", b"b", b"c"]
    with pytest.raises(
        MissingImage,
        match=r"'d' is not in .*1\.zip, whose names are like '.+'; 'd' is not in .*2\.tar",
    ):
        both.read("d")
    with pytest.raises(MissingImage, match="no images were given"):
        open_stores([]).read("a")


def test_a_store_below_a_name(tmp_path):
    path = zipped(tmp_path / "train2017.zip", {"train2017/1.jpg": b"1"})
    store = open_stores([f"coco={path}", f"gqa/images={path}"])
    assert store.read("coco/train2017/1.jpg") == store.read("gqa/images/train2017/1.jpg") == b"1"
    for name in ("train2017/1.jpg", "coco/1.jpg", "cocotrain2017/1.jpg"):
        with pytest.raises(MissingImage):
            store.read(name)
    named = folder(tmp_path / "a=b", {"1.jpg": b"1"})
    assert open_store(named).read("1.jpg") == b"1"


def test_the_same_name_in_shards_and_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (b"old", b"new"):
            info = tarfile.TarInfo("x.jpg")
            info.size = 3
            archive.addfile(info, io.BytesIO(data))
    tar(tmp_path / "b.tar", {"x.jpg": b"other"})
    store = open_store(tmp_path)
    assert store.read("x.jpg") == store.read("a.tar/x.jpg") == b"new"
    assert store.read("b.tar/x.jpg") == b"other"


def test_rows_of_shards(tmp_path):
    tar(tmp_path / "s-0.tar", {
        "d/000.jpg": b"0", "d/000.json": b"row 0",
        "d/001.json": b"row 1", "d/001.2.png": b"1b", "d/001.10.jpeg": b"1c", "d/001.1.jpg": b"1a",
        "d/002.jpg": b"without a row",
    })  # fmt: skip
    tar(tmp_path / "s-1.tar", {"000.json": b"row 2", "000.txt": b"no image"})
    rows = open_shard_rows(tmp_path)
    found = [rows[i] for i in range(len(rows))]
    assert [r.raw for r in found] == [b"row 0", b"row 1", b"row 2"]
    assert [r.key for r in found] == ["d/000", "d/001", "000"]
    assert [str(r.place) for r in found] == [
        f"{tmp_path}/{name}:1 (row {n})"
        for n, name in enumerate(
            ["s-0.tar/d/000.json", "s-0.tar/d/001.json", "s-1.tar/000.json"], 1
        )
    ]
    store = open_store(tmp_path)
    images = [[store.read(name) for name in r.beside] for r in found]
    assert images == [[b"0"], [b"1a", b"1b", b"1c"], []]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no webdataset shards in .*empty"):
        open_shard_rows(tmp_path / "empty")
