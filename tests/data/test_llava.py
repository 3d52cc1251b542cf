"""LLaVA's rows: what is read from lists and lines, and what is said of rows that are not fit."""

import json
import random

import pytest

from focus_jax.data import row_files
from focus_jax.data.dialogue import Dialogue
from focus_jax.data.llava import BadRow, parse_row, read_rows
from focus_jax.data.row_files import JsonRows, Place, Row
from tests.data.llava_made import row, talk

PLACE = Place("rows.jsonl", 3, 2)


def parsed(value, key="", beside=()):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_row(Row(raw, PLACE, key, beside))


def turns(*texts, image=None):
    found = parsed({"id": "a", "image": image, "conversations": talk(*texts)})
    assert isinstance(found, Dialogue), found
    return found.turns


def test_a_row_as_published():
    found = parsed(row("000", "coco/1.jpg", "What?\n<image>", "A cat.", "Sure?", "Yes."))
    expected = (("<image>\nWhat?", "A cat."), ("Sure?", "Yes."))
    assert found == Dialogue("000", ("coco/1.jpg",), expected, "rows.jsonl:3 (row 2)")


def test_markers():
    one = ("1.jpg",)
    assert turns("a <image> b ", "c", image=one[0]) == (("<image>\na  b", "c"),)
    assert turns("<image>", "c", image="1.jpg") == (("<image>", "c"),)
    # No marker: the only image stands in front.
    assert turns("look", "c", "so", "d", image=[*one]) == (("<image>\nlook", "c"), ("so", "d"))
    # Several in a turn have places that mean something.
    both = "first <image> then <image>"
    assert turns(both, "c", image=["1.jpg", "2.jpg"]) == ((both, "c"),)
    later = turns("<image>a", "b", "c <image>", "d", image=["1.jpg", "2.jpg"])
    assert later == (("<image>\na", "b"), ("<image>\nc", "d"))
    # LLaVA makes one of them where there is one image.
    assert turns(both, "c", "d", "e", image="1.jpg") == (("<image>\nfirst  then", "c"), ("d", "e"))
    # Text alone is text: nothing is moved or dropped.
    for said in ("the tag <image>", "<image>", "<image> and <image> "):
        assert turns("a", "b", said, "c") == (("a", "b"), (said, "c"))
    # An answer's text is text.
    assert turns("<image>", "the tag <image>", image="1.jpg")[0][1] == "the tag <image>"


def test_turns_without_a_partner():
    assert turns("a", "b", "c") == (("a", "b"),)
    said = [{"from": "gpt", "value": "hello"}, *talk("a", "b")]
    assert parsed({"id": "a", "conversations": said}).turns == (("a", "b"),)
    assert turns(" a ", "") == ((" a ", ""),)


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant")])
def test_names_of_roles(names):
    said = [{"from": name, "value": name} for name in names]
    assert parsed({"id": "a", "conversations": said}).turns == (names,)


def test_ids():
    said = talk("a", "b")
    assert parsed({"id": 17, "conversations": said}).id == "17"
    assert parsed({"id": "é\n", "conversations": said}).id == "é\n"
    assert parsed({"conversations": said}).id == "2"  # its number in the file
    assert parsed({"conversations": said}, key="shard/0001").id == "shard/0001"


def test_images_beside_a_row_are_its_own():
    found = parsed(row("a", "elsewhere.jpg"), "k", ("s.tar/k.jpg",))
    assert found.images == ("s.tar/k.jpg",)


GOOD = talk("a", "b")
BAD = [
    (b"{", "json", "not JSON"),
    (b"\xff", "encoding", "byte 1"),
    (b"[" * 100_000, "json", "nested too deeply"),
    (b'{"id":' + b"9" * 5000 + b"}", "json", "digits"),
    (b'{"id": NaN, "conversations": []}', "shape", "`id` is a number"),
    ([], "shape", "the row is a list"),
    (None, "shape", "the row is missing"),
    ({"id": True, "conversations": GOOD}, "shape", "`id` is true or false"),
    ({"id": "a"}, "shape", "`conversations` is missing"),
    ({"id": "a", "conversations": {"from": "human"}}, "shape", "is an object: a list"),
    ({"id": "a", "conversations": []}, "turns", "no question with an answer"),
    ({"id": "a", "conversations": talk("a")}, "turns", "no question with an answer"),
    ({"id": "a", "conversations": [*GOOD, None, None]}, "shape", "turn 3 is missing"),
    ({"id": "a", "conversations": [{"from": "human"}]}, "shape", "`value` of turn 1 is missing"),
    ({"id": "a", "conversations": [{"value": "x"}]}, "turns", "`from` of turn 1 is missing"),
    (
        {"id": "a", "conversations": [{"from": "system", "value": "x"}, *GOOD]},
        "turns",
        "turn 1 is 'system': one of human, user, gpt, assistant",
    ),
    ({"id": "a", "conversations": [{"from": [], "value": "x"}]}, "turns", "is a list"),
    (
        {"id": "a", "conversations": [GOOD[0], *GOOD, GOOD[1]]},
        "turns",
        "a user speaks twice in a row",
    ),
    ({"id": "a", "image": 3, "conversations": GOOD}, "shape", "`image` holds a number"),
    ({"id": "a", "image": ["a", {}], "conversations": GOOD}, "shape", "holds an object"),
    ({"id": "a", "image": ["a", "b"], "conversations": GOOD}, "markers", "2 images for 0 times"),
    ({"id": "a", "image": "1", "conversations": talk("<image>", "b", "<image>", "c")}, "markers",
     "1 images for 2 times"),
    (
        {"id": "a", "image": ["1", "2"], "conversations": talk("<image>", "<image>")},
        "markers",
        "1 more in answers",
    ),
    # The question that is dropped takes its image's place with it.
    ({"id": "a", "image": ["1", "2"], "conversations": talk("<image>", "b", "<image>")},
     "markers", "2 images for 1 times"),
    (b'{"id": "a", "conversations": [{"from": "human", "value": "\\ud800"}, '
     b'{"from": "gpt", "value": "b"}]}', "encoding", "U+D800"),
    (b'{"id": "\\udfff", "conversations": []}', "turns", "no question"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "kind", "reason"), BAD)
def test_what_is_not_fit(value, kind, reason):
    found = parsed(value)
    assert isinstance(found, BadRow)
    assert found.kind == kind
    assert reason in found.reason
    assert found.where == "rows.jsonl:3 (row 2)"
    told = json.loads(found.to_json())
    assert (told["file"], told["line"], told["row"]) == PLACE
    assert told["reason"] == found.reason


def test_a_row_that_is_too_long(monkeypatch, tmp_path):
    monkeypatch.setattr("focus_jax.data.llava.MAX_ROW", 200)
    monkeypatch.setattr(row_files, "MAX_ROW", 200)
    long = row("a", None, "x" * 200, "y")
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, (row("b"), long, row("c")))))
    kinds = [getattr(found, "kind", found.id) for found in read_rows(lines)]
    assert kinds == ["b", "json", "c"]
    # In a list, what does not end is a missing quote.
    monkeypatch.setattr(row_files, "_CHUNK", 64)
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([row("b"), row("c")])[:-4] + "x" * 600)
    with pytest.raises(ValueError, match=r"a\.json: row 2, .* line 1, does not end within 200 "):
        list(read_rows(listed))


def any_value(draw, depth=0):
    """Any JSON value, with signs that delimiting stumbles over."""
    kind = draw.randrange(8 if depth < 4 else 5)
    if kind < 3:
        return "".join(draw.choices('a"\\[]{},: \n\té😀\u2028', k=draw.randrange(9)))
    if kind < 5:
        return draw.choice([None, True, 0, -12, 3.5e7, 12345678901234567890])
    if kind == 5:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(n): any_value(draw, depth + 1) for n in range(draw.randrange(4))}


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 22])
def test_elements_of_a_list_are_found_wherever_chunks_end(chunk, monkeypatch, tmp_path):
    monkeypatch.setattr(row_files, "_CHUNK", chunk)
    draw, path = random.Random(chunk), tmp_path / "rows.json"
    for case in range(30):
        values = [any_value(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(values, indent=draw.choice([None, 1]), ensure_ascii=case % 2 == 0)
        path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf"]) + text.encode() + b" \n")
        rows = JsonRows(path)
        found = [rows[i] for i in range(len(rows))]
        assert [json.loads(r.raw) for r in found] == values
        assert [r.place.row for r in found] == list(range(1, len(values) + 1))


def test_lines_and_lists_hold_the_same(tmp_path):
    rows = [row(f"é{i}", None, "a\u2028b", "c" * i) for i in range(5)]
    files = {
        "one.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "a.jsonl": "\n\n".join(map(json.dumps, rows)),
        "windows.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n",
        "lines.json": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n",
    }
    lines = {}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        found = list(read_rows(tmp_path / name))
        assert [(d.id, d.turns) for d in found] == [
            (r["id"], (tuple(turn["value"] for turn in r["conversations"]),)) for r in rows
        ]
        places = [r.place for r in (JsonRows(tmp_path / name)[i] for i in range(5))]
        lines[name] = [place.line for place in places]
    assert lines["one.json"] == [1] * 5
    assert lines["a.jsonl"] == [1, 3, 5, 7, 9]
    assert lines["windows.jsonl"] == lines["lines.json"] == [1, 2, 3, 4, 5]
    # A row of that indentation takes 13 lines, behind the list's first.
    assert lines["pretty.json"] == [2 + 13 * i for i in range(5)]


def test_bad_elements_leave_their_neighbours(tmp_path):
    good = json.dumps(row("good")).encode()
    broken = [
        b"{'id': 1}",
        b'{"a": [1, 2,, ]}',
        b"nonsense",
        b'{"a": "\xff"}',
        b"[" * 9999 + b"]" * 9999,
    ]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",\n".join(x for bad in broken for x in (bad, good)) + b"]")
    found = list(read_rows(path))
    assert [isinstance(f, Dialogue) for f in found] == [False, True] * len(broken)
    assert [f.place.line for f in found[::2]] == [1, 3, 5, 7, 9]


def test_a_list_that_is_cut_off(tmp_path):
    whole, path = json.dumps([row("a"), {"b": [1, "]"]}], indent=1).encode(), tmp_path / "cut.json"
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.json: .*cut off"):
            read_rows(path)
    path.write_bytes(whole + b"[]")
    with pytest.raises(ValueError, match=r"line \d+ goes on behind the end of the list"):
        read_rows(path)


def test_files_without_rows(tmp_path):
    path = tmp_path / "rows.json"
    for text in (b"", b" \n", b"[]", b"[\n]\n"):
        path.write_bytes(text)
        assert list(read_rows(path)) == []
    path.write_bytes("[]".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16: write it as UTF-8"):
        read_rows(path)
    with pytest.raises(FileNotFoundError, match=r"no rows at .*none\.json"):
        read_rows(tmp_path / "none.json")
