"""Files that hold anything: no row stops a build, none that is good is lost."""

import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import NamedTuple

import pytest

from focus_jax.data.build import BuildConfig, build
from focus_jax.data.built import open_built
from focus_jax.data.image_store import open_stores
from focus_jax.data.row_files import JsonRows
from tests.data.llava_made import lying_jpeg, lying_png, photo, talk

GOOD, EITHER = "good", "either"


class Case(NamedTuple):
    """A row's bytes, its kind ("good", "either" or what is wrong) and what it should become."""

    raw: bytes
    kind: str
    images: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


@cache
def photos():
    """Images by name: whole ones in three stores, and broken ones."""
    whole = {f"{where}/{i}.jpg": photo(9 + i, 30 - i, i) for where in "fzt" for i in range(6)}
    form = {"f/a.png": "PNG", "f/b.gif": "GIF", "f/c.webp": "WEBP"}
    whole |= {name: photo(form=kind) for name, kind in form.items()}
    draw = random.Random(1)
    jpeg, png = photo(60, 60), photo(60, 60, form="PNG")
    broken = {f"bad/cut{i}.jpg": jpeg[: draw.randrange(20, len(jpeg) // 2)] for i in range(20)}
    broken |= {f"bad/cut{i}.png": png[: draw.randrange(1, len(png) // 2)] for i in range(20)}
    broken |= {
        "bad/empty.jpg": b"",
        "bad/page.jpg": b"<html>404 Not Found</html>",
        "bad/zeros.jpg": bytes(5000),
        "bad/huge.png": lying_png(60_000, 60_000),
        "bad/huge.jpg": lying_jpeg(60_000, 60_000),
        "bad/long.png": lying_png(2_000_000_000, 1),
        "bad/large.jpg": lying_jpeg(10_000, 9_000),
        "bad/script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    flipped = {}
    for i in range(60):
        data = bytearray((jpeg, png)[i % 2])
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        flipped[f"flip/{i}.bin"] = bytes(data)
    return whole, broken, flipped


def stores(root):
    """The images in a folder, a zip and a tar, by the first part of their names."""
    whole, broken, flipped = photos()
    for name, data in (whole | broken | flipped).items():
        if name[0] not in "zt":
            (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "images" / name).write_bytes(data)
    with zipfile.ZipFile(root / "z.zip", "w") as archive:
        for name in (name for name in whole if name[0] == "z"):
            archive.writestr(name, whole[name])
    with tarfile.open(root / "t.tar", "w") as archive:
        for name in (name for name in whole if name[0] == "t"):
            info = tarfile.TarInfo(name)
            info.size = len(whole[name])
            archive.addfile(info, BytesIO(whole[name]))
    return open_stores([root / "images", root / "z.zip", root / "t.tar"])


def words(draw, most=40):
    """Some text, of which any sign may be part."""
    signs = 'abc é漢😀\u2028\x00\x1b"\\\n\t{}[],:</s>' + "USER: ASSISTANT:"
    return "".join(draw.choices(signs, k=draw.randrange(most)))


def anything(draw, depth=0):
    """Any JSON value."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind == 6:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind > 6:
        keys = [words(draw, 5), "from", "value", "id"]
        return {draw.choice(keys): anything(draw, depth + 1) for _ in range(draw.randrange(4))}
    numbers = [0, -1, 10**300, 1e308, float("nan"), float("-inf")]
    return draw.choice([None, True, False, draw.choice(numbers), words(draw), "<image>"])


def good_row(draw, name):
    """A row that is to be kept; with what no reader should mind around it."""
    whole = sorted(photos()[0])
    images = tuple(draw.choices(whole, k=draw.choice([0, 0, 1, 1, 1, 2, 5])))
    texts = [words(draw) for _ in range(2 * draw.randrange(1, 4))]
    turns = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    said = [text for pair in turns for text in pair]
    if len(images) == 1:
        at = draw.randrange(len(turns))
        said[2 * at] = draw.choice([f"<image>\n{turns[at][0]}", f"{turns[at][0]}<image>"])
        turns[at][0] = f"<image>\n{turns[at][0].strip()}".strip()
    elif images:
        said[0] = turns[0][0] = "<image>" * len(images) + said[0]
    value = {"id": name, "conversations": talk(*said)}
    if images:
        value["image"] = list(images) if len(images) > 1 or draw.random() < 0.3 else images[0]
    elif draw.random() < 0.3:
        value["image"] = draw.choice([None, "", []])
    if draw.random() < 0.3:
        value["more"] = anything(draw)
    return value, images, tuple((user, answer) for user, answer in turns)


def dumped(value, draw):
    return json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def good(draw, name):
    value, images, turns = good_row(draw, name)
    return Case(dumped(value, draw), GOOD, images, turns)


def wrong_value(draw, name):
    """One part of a good row is anything else."""
    value, *_ = good_row(draw, name)
    value["conversations"][0]["from"] = "human"
    turn = draw.choice(value["conversations"])
    holder, key = draw.choice(
        [(value, "conversations"), (value, "image"), (value, "id"), (turn, "from"), (turn, "value")]
    )
    if draw.random() < 0.3:
        holder.pop(key, None)
    else:
        holder[key] = anything(draw)
    return Case(dumped(value, draw), EITHER)


def no_row(draw, name):
    value = draw.choice([None, 3, 1.5, True, "text", [], [1], {}, {"conversations": []}])
    return Case(json.dumps(value).encode(), "turns" if value == {"conversations": []} else "shape")


def wrong_turns(draw, name):
    said = talk("a", "b", "c", "d")
    kind, value = draw.choice(
        [
            ("turns", [said[0], said[0], said[1], said[1]]),
            ("turns", [said[0]]),
            ("turns", [said[1]]),
            ("turns", [{"from": "system", "value": "x"}, *said]),
            ("turns", [{"from": words(draw) + "?", "value": "x"}, *said]),
            ("shape", [*said, 3]),
            ("shape", {"0": said[0]}),
            ("shape", [{"from": "human", "value": ["a"]}, *said]),
            ("markers", talk("<image>", "b")),
        ]
    )
    fields = {"image": ["f/0.jpg", "f/1.jpg"]} if kind == "markers" else {}
    return Case(json.dumps({"id": name, "conversations": value, **fields}).encode(), kind)


def wrong_image(draw, name):
    """A picture that is missing, elsewhere or broken, perhaps between good ones."""
    missing = ["gone.jpg", "f", "f/0.jpg/x", "../images/f/0.jpg", "/etc/passwd", "../../etc/passwd"]
    missing += ["f/\x00.jpg", "n" * 300, "d/" * 3000, " f/0.jpg", "http://a.org/1.jpg", "f/0.JPG"]
    broken = sorted(photos()[1])
    kind, names = draw.choice([("missing image", missing), ("corrupt image", broken)])
    images = ["f/1.jpg"] * draw.randrange(2) + [draw.choice(names)]
    said = talk("<image>" * len(images), "b")
    return Case(json.dumps({"id": name, "image": images, "conversations": said}).encode(), kind)


def damaged_image(draw, name):
    value = {"id": name, "image": f"flip/{draw.randrange(60)}.bin", "conversations": talk("a", "b")}
    return Case(json.dumps(value).encode(), EITHER)


def deep(draw, name):
    depth, sign = draw.choice([5_000, 30_000]), draw.choice(["[]", "{}"])
    opening = sign[0] if sign == "[]" else '{"a":'
    inside = opening * depth + "0" + sign[1] * depth
    return Case(f'{{"id": "{name}", "conversations": {inside}}}'.encode(), "json")


def huge_number(draw, name):
    number = draw.choice(["9", "-1"]) + "7" * 5000
    return Case(f'{{"id": {number}, "conversations": []}}'.encode(), "json")


def half_a_pair(draw, name):
    text = json.dumps(draw.choice(["\ud800", "a\udfffb", "\udc00\ud800"]))
    said = f'[{{"from": "human", "value": {text}}}, {{"from": "gpt", "value": "b"}}]'
    return Case(f'{{"id": "{name}", "conversations": {said}}}'.encode(), "encoding")


def not_utf8(draw, name):
    raw, bad = good(draw, name).raw, draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"])
    at = raw.index(b'"value": "') + len(b'"value": "')
    return Case(raw[:at] + bad + b" " + raw[at:], "encoding")


def cut(draw, name):
    raw = json.dumps(good_row(draw, name)[0]).encode()
    return Case(raw[: draw.randrange(1, len(raw))], "json")


def noise(draw, name):
    """Bytes that are changed anywhere."""
    raw = bytearray(good(draw, name).raw)
    for _ in range(draw.choice([1, 2, 10])):
        raw[draw.randrange(len(raw))] = draw.choice(b'"\\{}[],:\x00\xffa1')
    return Case(bytes(raw), EITHER)


KINDS: dict[Callable[[random.Random, str], Case], int] = {
    good: 40, wrong_value: 12, no_row: 4, wrong_turns: 8, wrong_image: 12, damaged_image: 5,
    deep: 1, huge_number: 2, half_a_pair: 4, not_utf8: 4, cut: 4, noise: 4,
}  # fmt: skip
# In a list these would take the rows behind them along.
LINES_ONLY = {cut, noise}


def fuzz(root, count, seed):
    """Two files of rows in `root`; returns their cases in order, with file and line."""
    draw, placed = random.Random(seed), []
    listed, lines = [], []
    for number in range(count):
        (make,) = draw.choices([*KINDS], [*KINDS.values()])
        case = make(draw, f"row {number}")
        (lines if make in LINES_ONLY or draw.random() < 0.7 else listed).append(case)
    # Every row of the list takes one line, so that its lines are known.
    (root / "listed.json").write_bytes(b"[\n" + b",\n".join(c.raw for c in listed) + b"\n]\n")
    placed += [(str(root / "listed.json"), n, case) for n, case in enumerate(listed, 2)]
    with (root / "lines.jsonl").open("wb") as file:
        line = 1
        for case in lines:
            line += file.write(b"\n" * draw.choice([0, 0, 0, 1, 2]))
            placed.append((str(root / "lines.jsonl"), line, case))
            file.write(case.raw + b"\n")
            line += 1
    return placed


def check(root, count, seed, **settings):
    """Build from fuzzed rows: each is an example as it should be, or is listed with its place."""
    placed, images = fuzz(root, count, seed), stores(root)
    rows = [JsonRows(root / "listed.json"), JsonRows(root / "lines.jsonl")]
    report = build(rows, images, root / "out", BuildConfig(max_bad_share=1, **settings))
    data = open_built(root / "out", verify=True)
    kept = dict(zip(data.rows.tolist(), range(len(data)), strict=True))
    assert list(kept) == sorted(kept)
    listed = {}
    for line in (root / "out/bad_rows.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert found["reason"]
        listed[found["file"], found["line"]] = found
    assert report.rows == len(placed) == count
    assert report.kept == len(kept)
    assert report.bad == len(listed) == count - len(kept)
    for number, (file, line, case) in enumerate(placed):
        bad = listed.get((file, line))
        assert (bad is None) == (number in kept), (file, line, case)
        if case.kind == GOOD:
            assert bad is None, (bad, case)
            files = tuple(photos()[0][name] for name in case.images)
            assert data[kept[number]][1:] == (files, case.turns)
            assert data.texts(kept[number]) == case.turns
        elif case.kind != EITHER:
            assert bad and bad["kind"] == case.kind, (bad, case)
    return report


def test_a_few_fuzzed_rows(tmp_path):
    report = check(tmp_path, 300, seed=0, shards=3)
    assert min(report.kept, report.bad) > 90


@pytest.mark.slow
def test_ten_thousand_fuzzed_rows(tmp_path):
    report = check(tmp_path, 10_000, seed=1, shards=7, workers=2)
    assert min(report.kept, report.bad) > 3_000
    assert set(report.kinds) == {
        "corrupt image", "encoding", "json", "markers", "missing image", "shape", "turns",
    }  # fmt: skip
