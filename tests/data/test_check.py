"""`data check`: figures counted by hand, samples in pieces and colours, the command itself."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from focus_jax.cli.data import main
from focus_jax.data.build import BuildConfig, build
from focus_jax.data.check import Look, check, drawn
from focus_jax.data.conversation import BRIEF, PLAIN, VICUNA_V1, encode_dialogue, render
from focus_jax.data.dialogue import Example
from focus_jax.data.image_store import open_stores
from focus_jax.data.preprocess import ImageConfig
from focus_jax.data.row_files import JsonRows
from focus_jax.data.samples import Panel, Piece, pieces_of, spans_of, varied
from focus_jax.data.sheet import COLOURS, draw_sheet, visible, wrapped
from focus_jax.data.survey import figures, quantiles, survey
from tests.data.tokenizers_made import byte_level, llama_like

ANYRES = ImageConfig("anyres", pinpoints=((336, 672), (672, 336), (672, 672)))


def photo(width, height, shade=90):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 60, 30)).save(file, "JPEG")
    return file.getvalue()


class Rows:
    """A source in memory, of (images' sizes, turns)."""

    fingerprint = "rows"

    def __init__(self, rows):
        self.rows = rows
        largest = [max(sizes, key=np.prod, default=(0, 0)) for sizes, _ in rows]
        self.sizes = np.array(
            [(len(row[0]), *size) for row, size in zip(rows, largest, strict=True)], np.int32
        ).reshape(-1, 3)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        sizes, turns = self.rows[index]
        return Example(f"id{index}", tuple(photo(*size) for size in sizes), turns)

    def texts(self, index):
        return self.rows[index][1]

    def about(self):
        return {"made": "by hand"}


ROWS = [
    ([(640, 480)], (("<image>\nab", "cd"),)),
    ([], (("x", "</s>"), ("yz", ""))),
    ([(30, 20), (100, 300)], (("<image><image>", "红"),)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def test_figures_counted_by_hand(tokenizer):
    """With tokens of one byte: BOS, "USER: " 6, " ASSISTANT:" 11, " " 1, "</s>" 1."""
    out = survey(Rows(ROWS), [0, 1, 2], tokenizer, BRIEF, (20, 23, 40), ANYRES)
    assert out.tokens == [1 + 6 + 3 + 11 + 4, 1 + (6 + 1 + 11 + 3) + (6 + 2 + 11 + 2), 1 + 6 + 16]
    assert out.learnt == [4, 3 + 2, 5]
    assert out.asked == [2, 1 + 2, 0]
    assert out.characters == [12, 1 + 4 + 2, 14 + 1]
    told = figures(out)
    assert told["rows_by_images"] == {"0": 1, "1": 1, "2": 1}
    assert told["learnt_share"] == 14 / (25 + 43 + 23)
    assert told["turns"]["sum"] == 4
    # 640x480 fills 2 x 2 tiles and a thumbnail; 100x300 one above another.
    assert told["rows_by_tiles"] == {"3": 1, "5": 1}
    assert told["visual_tokens"]["max"] == 2340
    assert told["odd"] == {
        "a question of white space alone": 1, "an answer that holds '</s>'": 1,
        "an empty answer": 1,
    }  # fmt: skip
    first, second, third = told["cuts"]
    assert (first["rows"], first["rows_left_without_learnt_tokens"]) == (3, 1)
    # Learnt of the rows: 21 to 24; 19 to 21, 41 and 42; 18 to 22.
    assert first["share_of_learnt_tokens_lost"] == (4 + 4 + 3) / 14
    assert (second["rows"], third["rows"]) == (2, 1)
    assert third["share_of_learnt_tokens_lost"] == 2 / 14
    assert first["images_lost"] == 0


def test_images_behind_a_cut_are_counted(tokenizer):
    rows = Rows([([(20, 20), (20, 20)], (("<image>\na", "b"), ("<image>\nc", "d")))])
    (cut,) = figures(survey(rows, [0], tokenizer, BRIEF, (25,), ANYRES))["cuts"]
    assert cut["images_lost"] == 1


def test_rows_that_cannot_be_encoded_are_told(tokenizer, tmp_path):
    rows = Rows([*ROWS, ([(20, 20)], (("no marker", "a"),))])
    look = Look(BRIEF, tokenizer, (64,), ANYRES, 0, 0, 0)
    assert "1 images and 0 markers" in check(rows, [], look, tmp_path)
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["bad_rows_by_kind"] == {"encoding": 1}
    assert told["first_bad_rows"][0]["row"] == 3


def test_quantiles_are_values_that_occur():
    assert quantiles([]) == {}
    found = quantiles([5, 1, 3])
    assert (found["min"], found["p50"], found["max"], found["sum"]) == (1, 3, 5, 9)


TURNS = (("<image>\nwhat 红 ?", "red 🙂\n"), ("a\tb <image>", "c"))


@pytest.mark.parametrize("image", [False, True])
def test_pieces_spell_the_text_and_say_what_each_token_is_for(image):
    made = byte_level(merges=250, image=image)
    rendered = render(BRIEF, TURNS, image=False)
    pieces = pieces_of(made, rendered, encode_dialogue(made, BRIEF, TURNS, 2))
    assert pieces[0] == Piece("<s>", "neither")
    assert "".join(text for text, _ in pieces[1:]) == rendered.text
    said = {
        state: "".join(text for text, found in pieces if found == state)
        for state in ("learnt", "asked", "image")
    }
    assert said["asked"].replace(" ", "") == "what红?ab"
    assert said["learnt"] == " red 🙂\n</s> c</s>"
    assert said["image"] == "<image><image>"


def test_pieces_of_cut_text_and_of_text_without_a_tokenizer():
    made = llama_like(("▁red",), legacy=True)
    rendered = render(PLAIN, TURNS, image=False)
    pieces = pieces_of(made, rendered, encode_dialogue(made, PLAIN, TURNS, 2, 3))
    assert pieces == (("<s>", "neither"), ("<image>", "image"), ("red", "learnt"), (" ", "learnt"))
    assert spans_of(rendered) == (
        ("<image>", "image"), ("red 🙂\n\n", "learnt"), ("<image>", "image"), ("c\n", "learnt"),
    )  # fmt: skip


def test_lines_keep_all_text_and_break_where_it_does():
    pieces = [Piece("a" * 500, "learnt"), Piece("b\nc", "asked"), Piece("", "neither")]
    lines = wrapped(pieces, 400)
    assert "".join(text for line in lines for text, _ in line) == "a" * 500 + "b\nc"
    assert all(len("".join(text for text, _ in line)) <= 45 for line in lines)
    assert lines[-1] == [Piece("c", "asked")]
    assert visible("a\n\tb\U000e0020") == "a↵⇥b"
    assert visible("\ue123") == "□"


def pixels_of(path, colour):
    picture = np.asarray(Image.open(path))
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((picture == wanted).all(-1).sum())


def test_a_sheet_has_boxes_in_the_colours_of_its_tokens_and_the_photo(tmp_path):
    photo_ = Image.new("RGB", (50, 40), (200, 30, 10))
    text = (Piece("red", "learnt"), Piece("what", "asked"))
    draw_sheet(tmp_path / "one.png", "h", [Panel(0, "t", (photo_,), text)])
    draw_sheet(tmp_path / "none.png", "h", [Panel(0, "t", (), ())])
    for state, width in (("learnt", 3), ("asked", 4)):
        counts = [pixels_of(tmp_path / f"{n}.png", COLOURS[state]) for n in ("one", "none")]
        # A box of that many letters of 9 x 15 pixels, but for what the letters cover.
        assert 40 * width < counts[0] - counts[1] < 220 * width
    assert pixels_of(tmp_path / "one.png", "#C81E0A") == 50 * 40
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet(tmp_path / "x.png", "h", [])


def test_samples_are_of_all_kinds():
    images = np.array([1] * 50 + [0] + [2, 3])
    found = varied(images, 6, seed=0)
    assert sorted(np.minimum(images[found], 2).tolist()) == [0, 1, 1, 1, 2, 2]
    assert sorted(varied(images, 99, seed=1)) == list(range(53))
    assert drawn(10, 3, 0) == sorted(set(drawn(10, 3, 0)))
    assert drawn(4, 0, 0) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------- the command


def conversation(*turns):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    """Rows in JSON with images, two of them bad; the same built; a tokenizer's folder."""
    root = tmp_path_factory.mktemp("check")
    (root / "photos").mkdir()
    for name, size in (("a.jpg", (64, 48)), ("b.jpg", (30, 90))):
        (root / "photos" / name).write_bytes(photo(*size))
    (root / "photos" / "cut.jpg").write_bytes(photo(64, 64)[:300])
    rows = [
        {"id": "one", "image": "a.jpg", "conversations": conversation("<image>\nwhat ?", "红")},
        {"id": "cut", "image": "cut.jpg", "conversations": conversation("<image>", "b")},
        {"id": "text", "conversations": conversation("hello", "hi", "more ?", "no")},
        {"id": "bad", "conversations": 3},
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": conversation(
            "<image>\n<image>\nsame ?", "no")},
    ]  # fmt: skip
    (root / "rows.json").write_text(json.dumps(rows))
    build(
        [JsonRows(root / "rows.json")], open_stores([root / "photos"]), root / "built",
        BuildConfig(max_bad_share=0.5),
    )  # fmt: skip
    tokenizer.save_pretrained(root / "tokenizer")
    return root


def run(places, out, *flags):
    code = main(["check", *map(str, flags), "--out", str(out)])
    return code, json.loads((out / "check.json").read_text())


def test_a_built_set_and_its_rows_give_the_same_figures(places, tmp_path, capsys):
    token = ("--tokenizer", places / "tokenizer", "--template", "vicuna_v1", "--lengths", "180,170")
    code, built = run(places, tmp_path / "built", places / "built", *token)
    assert code == 0
    printed = capsys.readouterr().out
    for word in ("3 of 3 rows", "1 corrupt image, 1 shape", "cut.jpg"):
        assert word in printed
    assert {path.name for path in (tmp_path / "built").iterdir()} == {
        "check.json", "check.md", "histograms.png", "samples.png",
    }  # fmt: skip
    longest = len("USER: hello ASSISTANT: hiUSER: more ? ASSISTANT: no") + 2
    assert built["tokens"]["max"] == 1 + len(VICUNA_V1.system) + longest
    flags = ("--json", places / "rows.json", "--images", places / "photos", "--decode", *token)
    _, unbuilt = run(places, tmp_path / "unbuilt", *flags)
    assert built.pop("source")["kept"] == 3
    assert unbuilt.pop("source")["sources"]["rows"][0]["rows"] == 5
    assert built == unbuilt


def test_rows_without_images_and_tokenizer(places, tmp_path, capsys):
    code, told = run(places, tmp_path, "--json", places / "rows.json", "--sample", "4")
    assert code == 0
    assert told["rows_by_images"] == {"0": 1, "1": 2, "2": 1}
    assert told["bad_rows_by_kind"] == {"shape": 1}
    assert "tokens" not in told
    assert "give --tokenizer DIR" in capsys.readouterr().out
    assert (tmp_path / "samples.png").is_file()


def test_some_rows_alone(places, tmp_path):
    _, told = run(places, tmp_path, places / "built", "--rows", "2", "--sample", "0")
    assert (told["rows"], told["examples"]) == (2, 3)
    assert not (tmp_path / "samples.png").exists()


def test_wrong_flags_are_told(places, tmp_path, capsys):
    assert main(["check", "--out", str(tmp_path)]) == 1
    assert main(["check", str(places / "built"), "--json", str(places / "rows.json")]) == 1
    assert capsys.readouterr().err.count("one of the two") == 2
    (tmp_path / "none.json").write_text("[]")
    assert main(["check", "--json", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 1
    assert "there are no rows" in capsys.readouterr().err
