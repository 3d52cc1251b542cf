"""Yes/no and choice benchmarks: every layout read, prompts to the letter, answers scored."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focus_jax.evaluate import answers as on_disk
from focus_jax.evaluate.benchmark import PROTOCOLS, Rating
from focus_jax.evaluate.benchmarks import BENCHMARKS
from focus_jax.evaluate.benchmarks.server import write_submission
from tests.evaluate import miniatures_choice as made
from tests.evaluate.miniatures_choice import MCQ, MINIATURES, SHORT
from tests.evaluate.miniatures_open import encoded, put_lines, put_parquet

NAMES = list(dict.fromkeys(key.split("/")[0] for key in MINIATURES))
# Rows of lmms-eval's that have no ids.
NUMBERED = {"scienceqa", "ai2d"}
MMB_COLUMNS = "index\tquestion\timage\thint\tcategory\n"
MME_TEXT = "MME_Benchmark_release_version/existence/000000006040.txt"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Samples of every layout by protocol, each folder written once."""
    out = {}
    for key, write in MINIATURES.items():
        folder = tmp_path_factory.mktemp(key.replace("/", "-"))
        write(folder)
        benchmark = BENCHMARKS[key.split("/")[0]]
        out |= {(key, protocol): benchmark.read(folder, protocol) for protocol in PROTOCOLS}
    return out


def scored(benchmark, samples, answers, protocol="llava"):
    ratings = [
        benchmark.rate(s, answer, protocol) for s, answer in zip(samples, answers, strict=True)
    ]
    return benchmark.summarise(samples, ratings, protocol)


# ---------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_hold_the_same(samples, name, protocol):
    layouts = [key for key in MINIATURES if key.startswith(f"{name}/")]
    assert len(layouts) >= 2
    contents = []
    for key in layouts:
        found = samples[key, protocol]
        assert len({s.id for s in found}) == len(found)
        ids = () if name in NUMBERED else tuple(sorted(s.id for s in found))
        contents.append((ids, sorted((s.prompt, repr(s.gold), len(s.images)) for s in found)))
    assert all(content == contents[0] for content in contents)


@pytest.mark.parametrize("key", MINIATURES)
def test_images_are_there(samples, key):
    for sample in samples[key, "lmms-eval"]:
        for image in sample.images:
            opened = Image.open(image if isinstance(image, Path) else io.BytesIO(image()))
            assert min(opened.size) > 8


def test_prompts_to_the_letter(samples):
    def first(name, protocol="llava"):
        return samples[f"{name}/parquet", protocol][0].prompt

    assert [s.prompt for s in samples["scienceqa/llava", "llava"]] == [
        "Which is a solid?\nA. water\nB. a stone" + MCQ,
        "Context: Look at the map.\nWhich is farthest north?\nA. Maine\nB. Ohio\nC. Utah" + MCQ,
        "Which animal flies?\nA. bat\nB. cow\nC. eel\nD. ant" + MCQ,
    ]
    assert first("pope") == "Is there a dog in the image?" + SHORT
    assert first("mme") == "Is there a person in this image?" + SHORT
    artwork = "Does this artwork exist in the form of painting?"
    for protocol, space in (("llava", ""), ("lmms-eval", " ")):
        of = [s for s in samples["mme/author", protocol] if s.gold["category"] == "artwork"]
        assert of[0].prompt == artwork + space + SHORT
    options = "A. ball\nB. box"
    assert first("mmbench") == f"Look closely.\nWhich one is round?\n{options}{MCQ}"
    assert first("mmbench", "lmms-eval") == (
        f"Look closely. Which one is round? There are several options:\n{options}\n{MCQ}"
    )
    assert first("mmbench_cn").endswith("B. box\n请直接回答选项字母。")
    assert first("mmbench_cn", "lmms-eval").endswith(
        "B. box\n\n请直接使用所提供的选项字母作为答案回答。"
    )
    assert samples["mmbench/author", "llava"][1].prompt.startswith("What colour is it?\nA. red\n")
    assert first("seed") == (
        "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four" + MCQ
    )
    assert first("mmvet") == "What is x?"
    assert first("mmvet", "lmms-eval").endswith("to the following question: \n\nWhat is x?")


def test_mmmu_images_stand_where_a_protocol_has_them(samples):
    _, second, area, _ = samples["mmmu/parquet", "llava"]
    assert second.prompt == (
        "Which matches <image 2>, not <image 1>?\n(A) <image 3>\n(B) none\n" + MCQ
    )
    assert [image() for image in second.images] == [encoded(11)]
    assert area.prompt == "What is the area in <image 1>?" + SHORT
    _, second, area, _ = samples["mmmu/parquet", "lmms-eval"]
    assert second.prompt == (
        "<image> <image> <image>\n"
        "Which matches <image 2>, not <image 1>?\nA. <image 3>\nB. none\n" + MCQ
    )
    assert [image() for image in second.images] == [encoded(11), encoded(12), encoded(13)]
    assert area.prompt == "<image>\nWhat is the area in <image 1>?\n" + SHORT


def test_ai2d_covers_words_by_their_letters(samples, tmp_path):
    lettered, plain, _ = samples["ai2d/author", "llava"]
    assert plain.images[0].read_bytes() == encoded(0, ".png")
    drawn = np.asarray(Image.open(io.BytesIO(lettered.images[0]())))
    before = np.asarray(Image.open(io.BytesIO(encoded(0, ".png"))))
    box = np.zeros(before.shape[:2], bool)
    box[2:13, 2:15] = True
    assert np.array_equal(drawn[~box], before[~box])
    inside = drawn[box].astype(int)
    assert (inside == 255).all(-1).mean() > 0.3 and (inside < 128).all(-1).any()
    # The authors' own lettered diagrams come first; without either, the question is refused.
    made.ai2d_author(tmp_path)
    (tmp_path / "annotations" / "0.png.json").unlink()
    with pytest.raises(FileNotFoundError, match="letters in the diagram"):
        BENCHMARKS["ai2d"].read(tmp_path, "llava")
    (tmp_path / "abc_images").mkdir()
    [lettered, *_] = BENCHMARKS["ai2d"].read(tmp_path, "llava")
    assert lettered.images == (tmp_path / "abc_images" / "0.png",)


# ---------------------------------------------------------------------------------- scoring


def test_pope_figures(samples):
    asked = samples["pope/author", "llava"]  # yes, no for each category
    pope = BENCHMARKS["pope"]
    answers = ["Yes", "No", "Yes.", "Yes", "no", "no"]
    figures = scored(pope, asked, answers)
    # F1: 1; precision 1/2 and recall 1 give 2/3; nothing said yes gives 0.
    assert figures["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert figures["popular_f1"] == pytest.approx(100 * 2 / 3)
    assert figures["accuracy"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    assert figures["yes_ratio"] == pytest.approx(100 * (0.5 + 1 + 0) / 3)
    # lmms-eval: "Yes." is neither yes nor no, and the share of yes is the labels'.
    strict = scored(pope, asked, answers, "lmms-eval")
    assert strict["accuracy"] == pytest.approx(50)
    assert strict["f1"] == pytest.approx(100 * 2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert strict["yes_ratio"] == 50
    assert {s.unit for s in asked} == {Path(name).stem for name in made.POPE_IMAGES}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pope_without_an_answer_is_wrong_in_every_figure(samples, protocol):
    """No image, no answer: a yes that was missed, and a no that was not seen."""
    asked = samples["pope/author", protocol]
    pope = BENCHMARKS["pope"]
    right = [pope.rate(s, s.gold["answer"], protocol) for s in asked]
    assert pope.summarise(asked, right, protocol)["f1"] == 100
    missed = pope.summarise(asked, [Rating(0.0), *right[1:]], protocol)
    assert (missed["adversarial_recall"], missed["adversarial_f1"]) == (0, 0)
    unseen = pope.summarise(asked, [right[0], Rating(0.0), *right[2:]], protocol)
    assert (unseen["adversarial_precision"], unseen["adversarial_recall"]) == (50, 100)
    assert unseen["accuracy"] == missed["accuracy"] == pytest.approx(500 / 6)


def test_mme_figures(samples):
    asked = samples["mme/parquet", "llava"][:8]  # yes, no for each of four images
    figures = scored(BENCHMARKS["mme"], asked, ["Yes", "No", "No", "No", "Y", "no", "yes", "yes"])
    assert figures == {
        "perception": 325, "cognition": 50, "existence": 125, "artwork": 200,
        "code_reasoning": 50,
    }  # fmt: skip
    assert [s.unit for s in asked] == [s.gold["image"] for s in asked]


def test_mmbench_figures(samples):
    asked = samples["mmbench/author", "llava"]
    mmbench = BENCHMARKS["mmbench"]
    right = [s.gold["answer"] for s in asked]
    assert right == ["A", "A", "B", "C", "B"]
    assert scored(mmbench, asked, right)["accuracy"] == 100
    texts = ["ball", "red", "(B)", "It is red.", "A"]  # the last rotation of the second is wrong
    figures = scored(mmbench, asked, texts)
    assert figures == {"accuracy": 50, "attribute": 50, "object_shape": 100, "colour": 0}
    assert [s.unit for s in asked] == [0, 1, 0, 1, 1]


def test_mmbench_without_answers_is_for_its_server(tmp_path):
    mmbench = BENCHMARKS["mmbench"]
    made.mmbench_author(tmp_path, answers=False)
    asked = mmbench.read(tmp_path, "llava")
    assert scored(mmbench, asked, ["A"] * len(asked)) == {}
    assert math.isnan(mmbench.rate(asked[0], "A", "llava").score)
    rows = mmbench.submission(tmp_path, asked, ["A", "C.", "", "B", "A"])
    assert rows[1] == {
        "index": 1, "question": "What colour is it?", "A": "red", "B": "blue", "C": "green",
        "D": None, "answer": None, "prediction": "C.",
    }  # fmt: skip


def test_mmbench_with_answers_needs_no_server(samples, tmp_path):
    asked = samples["mmbench/author", "llava"]
    assert write_submission(BENCHMARKS["mmbench"], tmp_path, asked, tmp_path / "none") is None


def test_mmbench_cells_without_a_text(tmp_path):
    """LLaVA ends the options at the first that is absent, and "None" is absent; lmms-eval, whose
    files say "nan", leaves out that one, and its Chinese task takes a hint for what it says."""
    rows = [{"index": 1, "question": "Q?", "hint": "nan", "A": "x", "B": "nan", "C": "None",
             "D": "y", "answer": "D", "category": "c"}]  # fmt: skip
    table = {"A": "x", "B": "1", "C": "NULL", "D": "y", "hint": "n/a"}
    prompts = {}
    for language, name, file in (
        ("en", "mmbench", "mmbench_dev_20230712.tsv"),
        ("cn", "mmbench_cn", "mmbench_dev_cn_20231003.tsv"),
    ):
        put_parquet(tmp_path / language / "dev-00000-of-00001.parquet", rows, [0])
        for protocol in PROTOCOLS:
            [asked] = BENCHMARKS[name].read(tmp_path, protocol)
            prompts[language, protocol] = asked.prompt
        cells = {**rows[0], **table, "image": ""}
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(
            "\t".join(cells) + "\n" + "\t".join(str(cell) for cell in cells.values()) + "\n"
        )
        prompts[name] = [BENCHMARKS[name].read(tmp_path / name, p)[0].prompt for p in PROTOCOLS]
    several = "Q? There are several options:\nA. x\n"
    assert prompts["en", "llava"] == "Q?\nA. x" + MCQ
    assert prompts["cn", "llava"] == "Q?\nA. x\n请直接回答选项字母。"
    assert prompts["en", "lmms-eval"] == f"{several}C. None\nD. y\n{MCQ}"
    assert prompts["cn", "lmms-eval"].startswith(f"nan {several}C. None\nD. y\n\n请")
    # In a table pandas takes all of these for empty cells.
    assert prompts["mmbench"][0] == "Q?\nA. x\nB. 1" + MCQ
    assert all(p[1].startswith(f"{several}B. 1\nD. y\n\n") for p in (
        prompts["mmbench"], prompts["mmbench_cn"]
    ))  # fmt: skip


def test_mmbench_rotations_may_share_an_image(tmp_path):
    made.mmbench_author(tmp_path)
    table = tmp_path / "mmbench_dev_20230712.tsv"
    lines = table.read_text().split("\n")
    for number, line in enumerate(lines):
        cells = line.rstrip("\r").split("\t")
        if cells[0] in ("1000001", "2000001"):
            lines[number] = "\t".join([*cells[:-1], "1"])
    table.write_text("\n".join(lines))
    asked = {s.id: s for s in BENCHMARKS["mmbench"].read(tmp_path, "llava")}
    assert asked["2000001"].images[0]() == asked["1"].images[0]() == encoded(1)


def test_means_of_letters(samples):
    answers = {"scienceqa": ["B", "A. Maine", "b"], "seed": ["A", "C.", "B"],
               "ai2d": ["D", "A. cat", "(b)"]}  # fmt: skip
    strict = {"scienceqa": 200 / 3, "seed": 200 / 3, "ai2d": 200 / 3}
    kind = strict | {"seed": 100}
    for name, said in answers.items():
        for protocol, wanted in (("llava", strict), ("lmms-eval", kind)):
            asked = samples[f"{name}/parquet", protocol]
            figures = scored(BENCHMARKS[name], asked, said, protocol)
            assert figures["accuracy"] == pytest.approx(wanted[name]), (name, protocol)
    figures = scored(BENCHMARKS["seed"], samples["seed/author", "llava"], ["A", "A", "B"])
    assert figures["Instances Counting"] == 100 and figures["Instance Location"] == 0
    assert BENCHMARKS["scienceqa"].rate(
        samples["scienceqa/author", "llava"][2], "The answer is A.", "llava"
    ) == (1.0, "A")


def test_what_json_has_no_number_for_is_null(samples):
    """An open answer may be read as a number that is none, and a server's score is not known."""
    asked = samples["mmmu/author", "llava"][2]
    rating = BENCHMARKS["mmmu"].rate(asked, "nan", "llava")
    assert math.isnan(rating.parsed[0]) and rating.score == 0
    row = {"text": "nan", "metadata": {"score": math.inf, "parsed": rating.parsed, "of": (1, 2.5)}}
    strict = json.loads(on_disk.line(row), parse_constant=pytest.fail)
    assert strict == {"text": "nan", "metadata": {"score": None, "parsed": [None], "of": [1, 2.5]}}


def test_mmmu_figures(samples):
    asked = samples["mmmu/author", "llava"]
    mmmu = BENCHMARKS["mmmu"]
    figures = scored(mmmu, asked, ["C", "A", "It is 24.32 units", "MgS"])
    assert figures == {
        "accuracy": 75, "Art and Design": 50, "Art_Theory": 50, "Science": 100, "Math": 100,
    }  # fmt: skip
    # lmms-eval's own aggregation finds no open answer right: the authors' rule stands in for it.
    lmms_eval = samples["mmmu/author", "lmms-eval"]
    assert scored(mmmu, lmms_eval, ["C", "A", "24.32", "MgS"], "lmms-eval")["Math"] == 100
    # A random option, but the same whenever it is drawn.
    drawn = [mmmu.rate(asked[0], "no idea", "llava") for _ in range(5)]
    assert len(set(drawn)) == 1 and drawn[0].parsed in "ABC"
    others = [mmmu.rate(asked[0]._replace(id=str(i)), "?", "llava").parsed for i in range(40)]
    assert set(others) == set("ABC")


@pytest.mark.parametrize("name", ["mmvet", "llava_w"])
def test_judged_benchmarks_leave_it_to_the_judge(samples, name):
    benchmark, asked = BENCHMARKS[name], samples[f"{name}/author", "llava"]
    assert "GPT-4" in benchmark.judge and scored(benchmark, asked, ["a"] * len(asked)) == {}


def test_mmvet_submission(samples, tmp_path):
    asked = samples["mmvet/llava", "llava"]
    said = {"v1_0": "-1", "v1_1": "1.25", "v1_2": "it is", "v1_3": "3"}
    answers = tmp_path / "answers.jsonl"
    put_lines(answers, [{"question_id": name, "text": text} for name, text in said.items()])
    file = write_submission(BENCHMARKS["mmvet"], tmp_path, asked, answers)
    assert json.loads(file.read_text()) == said


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_tells_what_was_looked_for(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)looked for.*parquet.*come from"):
        BENCHMARKS[name].read(tmp_path, "llava")


def test_pope_is_of_all_three_categories(samples, tmp_path):
    made.pope_author(tmp_path)
    (tmp_path / "coco_pope_random.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the categories random"):
        BENCHMARKS["pope"].read(tmp_path, "llava")
    # The hub's other configuration has a split for each.
    for category in reversed(made.POPE):
        made.pope_parquet(tmp_path / "hub", [category], f"Full/{category}")
    whole = samples["pope/parquet", "llava"]
    assert [s[2:] for s in BENCHMARKS["pope"].read(tmp_path / "hub", "llava")] == [
        s[2:] for s in whole
    ]


def test_pope_labels_must_be_those_of_the_questions(tmp_path):
    made.pope_llava(tmp_path)
    path = tmp_path / "coco" / "coco_pope_random.json"
    put_lines(path, made.POPE["random"][::-1])
    with pytest.raises(ValueError, match=r"line 5 asks .* another question in its place"):
        BENCHMARKS["pope"].read(tmp_path, "llava")
    put_lines(path, [made.POPE["random"][0], made.POPE["random"][1] | {"label": "maybe"}])
    with pytest.raises(ValueError, match="line 6 has the label 'maybe'"):
        BENCHMARKS["pope"].read(tmp_path, "llava")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("scienceqa", "problems.json", "{}", 'problems.json has no "5"; it has nothing'),
        ("mme", MME_TEXT, "Is it?", "no question"),
        ("mme", MME_TEXT, "Is it?\tPerhaps", "'perhaps'"),
        ("mmbench", "mmbench_dev_20230712.tsv", MMB_COLUMNS + "1\tWhat?\t??\t\t\n",
         "line 2 has no image in base64"),
        ("mmbench", "mmbench_dev_20230712.tsv", "index\timage\n1\t\n", 'line 2 has no "question"'),
        ("mmvet", "mm-vet.json", '{"v1_0": {"question": "?"}}', 'v1_0 has no "imagename"'),
        ("llava_w", "questions.jsonl", '{"question_id": 1}\r\n', 'line 1 has no "image"'),
        ("ai2d", "questions/0.png.json", "[]", "holds list, not an object"),
        ("seed", "SEED-Bench.json", '{"questions": 3}', "list of objects"),
        ("ai2d", "ai2d_test_ids.csv", "0\n5\n", "names image 5"),
        ("pope", "coco_pope_popular.json", '{"question_id": 1}\n', 'line 1 has no "image"'),
    ],
)  # fmt: skip
def test_broken_files_are_named(name, file, content, message, tmp_path):
    MINIATURES[f"{name}/author"](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        for sample in BENCHMARKS[name].read(tmp_path, "llava"):
            sample.images[0]()


def test_mme_questions_of_llava_must_be_the_authors(tmp_path):
    made.mme_llava(tmp_path)
    put_lines(tmp_path / "llava_mme.jsonl", [
        {"question_id": "artwork/10002.jpg", "text": "Is it blue?" + SHORT, "category": "artwork"}
    ])  # fmt: skip
    with pytest.raises(ValueError, match="asks 'Is it blue"):
        BENCHMARKS["mme"].read(tmp_path, "llava")


def test_mme_is_of_all_categories(tmp_path):
    made.mme_author(tmp_path)
    place = tmp_path / "MME_Benchmark_release_version" / "scene"
    place.rename(place.with_name("scenes"))
    with pytest.raises(FileNotFoundError, match="lacks scene: its figures are sums over all"):
        BENCHMARKS["mme"].read(tmp_path, "llava")


def test_mme_asks_what_llavas_file_has(tmp_path):
    """White space of its own, while lmms-eval's prompt is of the authors' text."""
    made.mme_llava(tmp_path)
    place = {"question_id": "artwork/10002.jpg", "category": "artwork"}
    text = "Does this artwork exist  in the form of painting?" + SHORT
    put_lines(tmp_path / "llava_mme.jsonl", [place | {"text": text}])
    [asked] = BENCHMARKS["mme"].read(tmp_path, "llava")
    assert asked.prompt == text and asked.gold["answer"] == "yes"
    [asked] = BENCHMARKS["mme"].read(tmp_path, "lmms-eval")
    assert asked.prompt == "Does this artwork exist in the form of painting? " + SHORT


def test_mmmu_options_that_are_no_list(tmp_path):
    rows = made.mmmu_rows()
    made.write_mmmu(tmp_path / "validation-00000-of-00001.parquet", [rows[0] | {"options": "A, B"}])
    with pytest.raises(ValueError, match="validation_Art_Theory_1: 'A, B' is no list"):
        BENCHMARKS["mmmu"].read(tmp_path, "llava")
    marked = rows[0] | {"question": "<image 9>?"}
    made.write_mmmu(tmp_path / "validation-00000-of-00001.parquet", [marked])
    with pytest.raises(ValueError, match=r"names the images \[9\]"):
        BENCHMARKS["mmmu"].read(tmp_path, "lmms-eval")


def test_published_figures_are_those_of_the_table():
    assert BENCHMARKS["pope"].published["llava-1.5-7b"] == 85.9
    assert BENCHMARKS["mme"].published["llava-1.5-13b"] == 1531.3
    not_means = {name for name in NAMES if not BENCHMARKS[name].is_mean}
    assert not_means == {"pope", "mme", "mmbench", "mmbench_cn"}
