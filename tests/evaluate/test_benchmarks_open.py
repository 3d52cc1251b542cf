"""Open-ended benchmarks: every layout gives the same questions; answers by hand give figures."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from focus_jax.evaluate.benchmarks import (
    chartqa,
    docvqa,
    gqa,
    infovqa,
    ocrbench,
    server,
    textvqa,
    vizwiz,
    vqav2,
)
from tests.evaluate.miniatures_open import MINIATURES, PROVIDED, SHORT, put_parquet

BENCHMARKS = {
    "vqav2": vqav2.BENCHMARK, "gqa": gqa.BENCHMARK, "vizwiz": vizwiz.BENCHMARK,
    "textvqa": textvqa.BENCHMARK, "textvqa_ocr": textvqa.WITH_OCR, "docvqa": docvqa.BENCHMARK,
    "infovqa": infovqa.BENCHMARK, "chartqa": chartqa.BENCHMARK, "ocrbench": ocrbench.BENCHMARK,
}  # fmt: skip
# Layouts that have no gold answers: LLaVA's are of the test splits.
UNRATED = ("vqav2/llava", "vizwiz/llava")


def made(folder: Path, key: str):
    """The samples of a miniature."""
    MINIATURES[key](folder)
    return BENCHMARKS[key.partition("/")[0]].read(folder, "llava")


def content(picture) -> bytes:
    return picture.read_bytes() if isinstance(picture, Path) else picture()


def shown(sample) -> list[tuple[int, int]]:
    """The sizes of a sample's images, by which miniatures' images differ (their formats may)."""
    return [Image.open(io.BytesIO(content(picture))).size for picture in sample.images]


def right_answer(sample) -> str:
    """The most frequent gold answer."""
    golds = sample.gold.get("answers") or [sample.gold["answer"]]
    return max(golds, key=golds.count)


def figures(benchmark, samples, answers, protocol="llava"):
    """The figures of answers in the samples' order."""
    ratings = [benchmark.rate(s, a, protocol) for s, a in zip(samples, answers, strict=True)]
    return benchmark.summarise(samples, ratings, protocol)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_names_and_headlines_agree(name, tmp_path):
    benchmark = BENCHMARKS[name]
    assert benchmark.name == name
    samples = made(tmp_path, f"{name}/parquet")
    found = figures(benchmark, samples, [right_answer(s) for s in samples])
    assert benchmark.headline in found
    if benchmark.is_mean:
        ratings = [benchmark.rate(s, right_answer(s), "llava").score for s in samples]
        assert found[benchmark.headline] == pytest.approx(100 * sum(ratings) / len(ratings))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_layouts_of_the_same_content_are_read_alike(name, tmp_path):
    layouts = [key for key in MINIATURES if key.startswith(f"{name}/") and key not in UNRATED]
    first, *others = [made(tmp_path / key.replace("/", "_"), key) for key in layouts]
    assert len({s.id for s in first}) == len(first) >= 4
    assert others
    for samples in others:
        assert [s.id for s in samples] == [s.id for s in first]
        assert [s.prompt for s in samples] == [s.prompt for s in first]
        assert [s.gold for s in samples] == [s.gold for s in first]
        for one, other in zip(first, samples, strict=True):
            assert shown(one) == shown(other)
            # Where a layout knows which questions share an image, it is the same as elsewhere.
            assert other.unit in (one.unit, None)


@pytest.mark.parametrize("key", MINIATURES)
def test_gold_values_are_json_and_images_open(key, tmp_path):
    for sample in made(tmp_path, key):
        assert json.loads(json.dumps(dict(sample.gold))) == sample.gold
        assert len(shown(sample)) == 1
        assert "<image>" not in sample.prompt


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_without_the_files_says_what_each_layout_holds(name, tmp_path):
    benchmark = BENCHMARKS[name]
    with pytest.raises(FileNotFoundError, match="does not exist") as told:
        benchmark.read(tmp_path / "nowhere", "llava")
    for words in ("authors: ", "lmms-eval: ", "parquet", "come from"):
        assert words in str(told.value)
    with pytest.raises(FileNotFoundError, match="none of its files"):
        benchmark.read(tmp_path, "llava")


# ---------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("key", "prompt"),
    [
        ("vqav2/author", "Is it sunny?" + SHORT),
        ("vqav2/llava", "Is it sunny?" + SHORT),
        ("gqa/parquet", "Is it overcast?" + SHORT),
        ("vizwiz/author", "What is this? and what color is it?" + PROVIDED + SHORT),
        ("vizwiz/llava", "What is this? and what color is it?" + PROVIDED + SHORT),
        ("textvqa/llava", "What brand is this camera?" + SHORT),
        (
            "textvqa_ocr/author",
            "What brand is this camera?\nReference OCR token: DAKOTA, DIGITAL, 5." + SHORT,
        ),
        ("docvqa/parquet", "What is the actual value per 1000?" + SHORT),
        (
            "chartqa/author",
            "How many food items are shown?\nAnswer the question with a single word.",
        ),
        ("ocrbench/author", "what is written in the image?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", ["llava", "lmms-eval"])
def test_the_first_prompt_to_the_letter(key, prompt, protocol, tmp_path):
    MINIATURES[key](tmp_path)
    assert BENCHMARKS[key.partition("/")[0]].read(tmp_path, protocol)[0].prompt == prompt


def test_an_image_without_tokens_keeps_the_line(tmp_path):
    samples = made(tmp_path, "textvqa_ocr/llava")
    assert samples[2].prompt == "Are these on or off?\nReference OCR token: " + SHORT
    assert textvqa.without_tokens(samples[2].prompt) == "Are these on or off?" + SHORT


def test_lengths_of_answers():
    lengths = {name: benchmark.max_new_tokens for name, benchmark in BENCHMARKS.items()}
    assert lengths["docvqa"] == lengths["infovqa"] == 32
    assert lengths["vqav2"] == lengths["gqa"] == lengths["textvqa"] == lengths["vizwiz"] == 128


# ---------------------------------------------------------------------------------- figures


def test_vqav2_figures_by_hand(tmp_path):
    samples = made(tmp_path, "vqav2/author")
    found = figures(vqav2.BENCHMARK, samples, ["yes", "3", "The cup.", "nobody"])
    # 8 of 10 agree: 1. 2 of 10: (2 x 1/3 + 8 x 2/3) / 10 = 0.6. "the" goes.
    expected = {"accuracy": 55.0, "yes/no": 100.0, "number": 60.0, "other": 30.0}
    assert found == pytest.approx(expected)
    # One of ten wrote "two dogs": 0 of that set, 1/3 of the nine others.
    (one,) = [vqav2.rate(samples[1], "2 dogs", "llava")]
    assert one.score == pytest.approx(0.3)
    assert one.parsed == "2 dogs"


def test_protocols_differ_where_their_rules_do(tmp_path):
    (sample, *_) = made(tmp_path / "vqa", "vqav2/author")
    sample = sample._replace(gold={"answers": ["dog's"] * 10, "type": "other"})
    assert vqav2.rate(sample, "dog's", "llava").parsed == "dog 's"
    assert vqav2.rate(sample, "dog's", "lmms-eval").parsed == "dog's"
    assert vqav2.rate(sample, "dog 's", "lmms-eval").score == 0.0
    assert vqav2.rate(sample, "dog 's", "llava").score == 1.0
    scene = made(tmp_path / "gqa", "gqa/author")[0]
    assert gqa.rate(scene, "No!", "llava").score == 0.0
    assert gqa.rate(scene, "No!", "lmms-eval").score == 1.0
    text = made(tmp_path / "ocr", "ocrbench/author")[0]
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "CENTRE")
    assert ocrbench.rate(text, wide, "llava").score == 0.0
    assert ocrbench.rate(text, wide, "lmms-eval").score == 1.0


def test_chartqa_and_ocrbench_figures_by_hand(tmp_path):
    charts = made(tmp_path / "charts", "chartqa/author")
    found = figures(chartqa.BENCHMARK, charts, ["14.5", "0.5", "0", "peru"])
    assert found == {"overall": 75.0, "human": 50.0, "augmented": 100.0}
    texts = made(tmp_path / "texts", "ocrbench/author")
    found = figures(ocrbench.BENCHMARK, texts, ["centre", "10:10", "", "12/3.", "x^2"])
    assert found == {
        "score": 600.0, "recognition": 300.0, "scene": 200.0, "document": 0.0,
        "information": 200.0, "formulas": 0.0,
    }  # fmt: skip
    assert sum(ocrbench.POINTS.values()) == 1000


def test_docvqa_figures_by_hand(tmp_path):
    pages = made(tmp_path, "docvqa/author")
    found = figures(docvqa.BENCHMARK, pages, ["0.28", "UNIVERSITY OF CALIFORNIA", "ITX", "Peter"])
    assert found == {"anls": pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4)}


# ------------------------------------------------------------- questions that a server rates


@pytest.mark.parametrize("key", UNRATED)
def test_without_gold_answers_there_are_no_figures_but_a_file_for_the_server(key, tmp_path):
    samples = made(tmp_path, key)
    benchmark = BENCHMARKS[key.partition("/")[0]]
    assert figures(benchmark, samples, ["yes"] * len(samples)) == {}
    said = ["The Cat.", "two", "dont", ""]
    file = tmp_path / "answers.jsonl"
    rows = [{"question_id": s.id, "text": t} for s, t in zip(samples, said, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(ValueError, match="lacks 1 of 4 answers"):
        server.write_submission(benchmark, tmp_path, samples, file)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = server.write_submission(benchmark, tmp_path, samples, file)
    expected = ["cat", "2", "don't", ""]
    sent = json.loads(path.read_text())
    if key == "vqav2/llava":  # every question of test2015, the one not asked first
        assert sent[0] == {"question_id": 7003, "answer": ""}
        ids = [42000, 42001, 262144000, 262144005]
        assert sent[1:] == [
            {"question_id": i, "answer": a} for i, a in zip(ids, expected, strict=True)
        ]
    else:
        names = [f"VizWiz_test_{number:08}.jpg" for number in range(4)]
        assert sent == [{"image": n, "answer": a} for n, a in zip(names, expected, strict=True)]


def test_nothing_is_written_where_the_gold_answers_are_here(tmp_path):
    samples = made(tmp_path, "vqav2/author")
    answers = tmp_path / "answers.jsonl"
    assert server.write_submission(vqav2.BENCHMARK, tmp_path, samples, answers) is None
    samples = [sample._replace(gold={"answer": "B"}) for sample in samples]
    assert server.write_submission(vqav2.BENCHMARK, tmp_path, samples, answers) is None


def test_validation_is_taken_before_test_only_with_its_images(tmp_path):
    MINIATURES["vizwiz/llava"](tmp_path)
    MINIATURES["vizwiz/author"](tmp_path)
    assert vizwiz.read(tmp_path, "llava")[0].gold["answers"]
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert "answers" not in vizwiz.read(tmp_path, "llava")[0].gold


# -------------------------------------------------------------------------- files that differ


def test_a_question_without_its_answers_is_named(tmp_path):
    MINIATURES["vqav2/author"](tmp_path)
    path = tmp_path / vqav2.ANNOTATIONS
    notes = json.loads(path.read_text())
    notes["annotations"].pop()
    path.write_text(json.dumps(notes))
    with pytest.raises(ValueError, match="no answers to question 42000"):
        vqav2.read(tmp_path, "llava")


def test_a_question_of_llavas_that_the_authors_lack_is_named(tmp_path):
    for name, module in (("gqa", gqa), ("textvqa", textvqa)):
        MINIATURES[f"{name}/llava"](tmp_path / name)
        with (tmp_path / name / module.LLAVA).open("a") as lines:
            row = {"question_id": "9", "image": "9.jpg", "text": "Who?" + SHORT}
            lines.write(json.dumps(row))
        with pytest.raises(ValueError, match="row 4"):
            BENCHMARKS[name].read(tmp_path / name, "llava")


def test_tokens_that_are_not_there_are_asked_for(tmp_path):
    MINIATURES["textvqa/author"](tmp_path)
    path = tmp_path / textvqa.TOKENS
    path.write_text(json.dumps({"data": []}))
    with pytest.raises(ValueError, match="has no image 003a8ae2ef43b901"):
        textvqa.WITH_OCR.read(tmp_path, "llava")
    path.unlink()
    assert textvqa.BENCHMARK.read(tmp_path, "llava")
    with pytest.raises(FileNotFoundError, match=textvqa.TOKENS):
        textvqa.WITH_OCR.read(tmp_path, "llava")


def test_two_questions_of_one_text_keep_ids_of_their_own(tmp_path):
    MINIATURES["textvqa/llava"](tmp_path)
    path = tmp_path / textvqa.LLAVA
    first = path.read_text().splitlines()[0]
    with path.open("a") as lines:
        lines.write(first + "\n")
    ids = [sample.id for sample in textvqa.BENCHMARK.read(tmp_path, "llava")]
    assert ids[0] == "34602"
    assert ids[-1] == "34602-2"


def test_images_and_kinds_that_do_not_fit_are_named(tmp_path):
    MINIATURES["gqa/author"](tmp_path / "gqa")
    (tmp_path / "gqa" / "images").rename(tmp_path / "gqa" / "pictures")
    with pytest.raises(FileNotFoundError, match="no folder of images: looked for images"):
        gqa.read(tmp_path / "gqa", "llava")
    MINIATURES["gqa/parquet"](tmp_path / "parquet")
    shown = tmp_path / "parquet" / gqa.SHOWN / "testdev-00000-of-00001.parquet"
    put_parquet(shown, [{"id": "n161313"}], [0])
    with pytest.raises(ValueError, match="no image n288870"):
        gqa.read(tmp_path / "parquet", "llava")
    MINIATURES["docvqa/parquet"](tmp_path)
    (tmp_path / "DocVQA").rename(tmp_path / "data")
    with pytest.raises(ValueError, match="DocVQA's questions, not InfographicVQA's"):
        infovqa.read(tmp_path, "llava")
    with pytest.raises(ValueError, match="Riddle"):
        ocrbench.gold_of("x", "Riddle", "IAM", "row 1")
