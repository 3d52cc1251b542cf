"""Choice and yes/no benchmarks of a few questions, as authors, LLaVA and lmms-eval write them.

The same content in every layout that can hold it. Each function writes a benchmark's own folder.
"""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.evaluate.miniatures_open import encoded, put, put_images, put_lines, put_parquet

Row = dict[str, Any]
SHORT = "\nAnswer the question using a single word or phrase."
MCQ = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFG"


def options(texts: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def picture(number: int, suffix: str = ".jpg") -> Row:
    """An image as the hub's parquet files hold it."""
    return {"bytes": encoded(number, suffix), "path": None}


# -------------------------------------------------------------------------------- ScienceQA

SCIENCE: dict[str, Row] = {
    "5": {"question": "Which is a solid?", "choices": ["water", "a stone"], "answer": 1,
          "hint": "", "image": "image.png"},
    "11": {"question": "What is 1 + 1?", "choices": ["1", "2"], "answer": 1, "hint": "",
           "image": None},
    "14": {"question": "Which is farthest north?", "choices": ["Maine", "Ohio", "Utah"],
           "answer": 0, "hint": "Look at the map.", "image": "image.png"},
    "20": {"question": "Which animal flies?", "choices": ["bat", "cow", "eel", "ant"],
           "answer": 0, "hint": "", "image": "choice.png"},
    "23": {"question": "In training?", "choices": ["yes", "no"], "answer": 0, "hint": "",
           "image": "image.png"},
}  # fmt: skip
SCIENCE_TEST = ["5", "11", "14", "20"]


def science_images() -> list[str]:
    return [f"{pid}/{SCIENCE[pid]['image']}" for pid in SCIENCE_TEST if SCIENCE[pid]["image"]]


def scienceqa_author(folder: Path) -> None:
    put(folder / "problems.json", SCIENCE)
    put(folder / "pid_splits.json", {"train": ["23"], "test": SCIENCE_TEST})
    put_images(folder / "images" / "test", science_images())


def scienceqa_llava(folder: Path) -> None:
    scienceqa_author(folder)
    rows = []
    for pid in SCIENCE_TEST:
        row = SCIENCE[pid]
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        text = f"{context}{row['question']}\n{options(row['choices'])}"
        image = {"image": f"{pid}/{row['image']}"} if row["image"] else {}
        value = f"<image>\n{text}" if image else text
        talk = [{"from": "human", "value": value}, {"from": "gpt", "value": "The answer is A."}]
        rows.append({"id": pid, "conversations": talk} | image)
    put(folder / "llava_test_CQM-A.json", rows)


def scienceqa_parquet(folder: Path) -> None:
    rows = [{k: v for k, v in SCIENCE[pid].items() if k != "image"} for pid in SCIENCE_TEST
            if SCIENCE[pid]["image"]]  # fmt: skip
    path = folder / "ScienceQA-IMG" / "test-00000-of-00001-2.parquet"
    put_parquet(path, rows, range(len(rows)))


# ------------------------------------------------------------------------------------- POPE

POPE_IMAGES = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]
POPE = {
    category: [
        {"question_id": 1, "image": POPE_IMAGES[0], "text": f"Is there a {a} in the image?",
         "label": "yes"},
        {"question_id": 2, "image": POPE_IMAGES[1], "text": f"Is there a {b} in the image?",
         "label": "no"},
    ]
    for category, (a, b) in {
        "adversarial": ("dog", "chair"), "popular": ("dog", "person"), "random": ("cat", "bus"),
    }.items()
}  # fmt: skip


def pope_author(folder: Path, below: str = ".") -> None:
    for category, rows in POPE.items():
        put_lines(folder / below / f"coco_pope_{category}.json", rows)
    put_images(folder / "val2014", POPE_IMAGES)


def pope_llava(folder: Path) -> None:
    pope_author(folder, "coco")
    rows = [
        {"question_id": number, "image": row["image"], "text": row["text"] + SHORT,
         "category": category}
        for number, (category, row) in enumerate(
            (category, row) for category, of in POPE.items() for row in of
        )
    ]  # fmt: skip
    put_lines(folder / "llava_pope_test.jsonl", rows)


def pope_parquet(
    folder: Path, categories: Sequence[str] = tuple(POPE), split: str = "data/test"
) -> None:
    rows = [
        {"id": str(number), "question_id": str(row["question_id"]), "question": row["text"],
         "answer": row["label"], "image_source": Path(row["image"]).stem, "category": category}
        for category in categories
        for number, row in enumerate(POPE[category])
    ]  # fmt: skip
    shown = [POPE_IMAGES.index(f"{row['image_source']}.jpg") for row in rows]
    put_parquet(folder / f"{split}-00000-of-00001.parquet", rows, shown)


# -------------------------------------------------------------------------------------- MME

# category, image, its two questions with their answers; the artwork's have two spaces.
MME = [
    ("existence", "000000006040.jpg",
     [("Is there a person in this image?", "Yes"), ("Is there a refrigerator?", "No")]),
    ("existence", "000000007818.jpg",
     [("Is there a train in this image?", "Yes"), ("Is there a bottle?", "No")]),
    ("artwork", "10002.jpg",
     [("Does this artwork exist in the form of painting? ", "Yes"),
      ("Does this artwork exist in the form of glassware? ", "No")]),
    ("code_reasoning", "0020.png",
     [("Is a python code shown in the picture?", "Yes"), ("Is a c++ code shown?", "No")]),
    *((category, "0001.png", [("Is it right?", "Yes"), ("Is it wrong?", "No")])
      for category in ("count", "position", "color", "posters", "celebrity", "scene", "landmark",
                       "OCR", "commonsense_reasoning", "numerical_calculation",
                       "text_translation")),
]  # fmt: skip
DEMAND = " Please answer yes or no."


def mme_author(folder: Path) -> None:
    root = folder / "MME_Benchmark_release_version"
    for number, (category, image, asked) in enumerate(MME):
        apart = category == "artwork"
        text = "\n".join(f"{question}{DEMAND}\t{answer}" for question, answer in asked)
        place = "questions_answers_YN" if apart else "."
        put(root / category / place / f"{Path(image).stem}.txt", text + "\n")
        put(root / category / ("images" if apart else ".") / image,
            encoded(number, Path(image).suffix))  # fmt: skip


def mme_llava(folder: Path) -> None:
    mme_author(folder)
    rows = [
        {"question_id": f"{category}/{image}", "image": f"{category}/{image}",
         "text": question.strip() + SHORT, "category": category}
        for category, image, asked in reversed(MME)
        for question, _ in asked
    ]  # fmt: skip
    put_lines(folder / "llava_mme.jsonl", rows)


def mme_parquet(folder: Path) -> None:
    rows, shown = [], []
    for number, (category, image, asked) in enumerate(MME):
        for question, answer in asked:
            rows.append({"question_id": f"{category}/{image}", "question": question + DEMAND,
                         "answer": answer, "category": category})  # fmt: skip
            shown.append(number)
    put_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, shown)


# ---------------------------------------------------------------------------------- MMBench

MMB_QUESTIONS: list[Row] = [
    {"question": "Which one is round?", "hint": "Look closely.", "options": ["ball", "box"],
     "category": "object_shape", "l2": "attribute"},
    {"question": "What colour is it?", "hint": "", "options": ["red", "blue", "green"],
     "category": "colour", "l2": "attribute"},
]  # fmt: skip


def rotations() -> list[Row]:
    """Every rotation of each question; the right option is the first of the unrotated ones."""
    rows = []
    for turn in range(3):
        for number, asked in enumerate(MMB_QUESTIONS):
            texts = asked["options"]
            if turn >= len(texts):
                continue
            turned = texts[turn:] + texts[:turn]
            rows.append(
                {"index": number + turn * 1_000_000, "question": asked["question"],
                 "hint": asked["hint"], **dict.fromkeys("ABCD", ""),
                 **dict(zip(LETTERS, turned, strict=False)),
                 "answer": LETTERS[turned.index(texts[0])], "category": asked["category"],
                 "source": "made", "l2-category": asked["l2"], "comment": "", "split": "dev"}
            )  # fmt: skip
    return rows


def mmbench_author(folder: Path, language: str = "en", *, answers: bool = True) -> None:
    name = {"en": "mmbench_dev_20230712.tsv", "cn": "mmbench_dev_cn_20231003.tsv"}[language]
    if not answers:
        name = "mmbench_test_20230712.tsv"
    rows = [
        row | {"image": base64.b64encode(encoded(row["index"] % 1_000_000)).decode()}
        for row in rotations()
    ]
    names = [name for name in rows[0] if answers or name != "answer"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, delimiter="\t", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    put(folder / name, text.getvalue())


def mmbench_parquet(folder: Path, language: str = "en") -> None:
    rows = []
    for row in rotations():
        row = {k: (v if v != "" else "nan") for k, v in row.items()}
        if language == "cn" and row["hint"] == "nan":
            row["hint"] = None  # with "nan", lmms-eval's Chinese task would ask "nan" first
        row["L2-category"] = row.pop("l2-category")
        rows.append(row)
    shown = [row["index"] % 1_000_000 for row in rows]
    put_parquet(folder / language / "dev-00000-of-00001.parquet", rows, shown)


# --------------------------------------------------------------------------------------- SEED

SEED: list[Row] = [
    {"question_id": "101669", "data_id": "1454426_2591111986", "data_type": "image",
     "question": "How many towels are in the image?", "answer": "A", "question_type_id": 5,
     "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"},
    {"question_id": "6", "data_id": "1454426_2591111987", "data_type": "image",
     "question": "Where is the dog?", "answer": "C", "question_type_id": 4,
     "choice_a": "Left", "choice_b": "Right", "choice_c": "Above", "choice_d": "Below"},
    {"question_id": "v_7", "data_id": "clip.mp4", "data_type": "video",
     "question": "What is done?", "answer": "D", "question_type_id": 10,
     "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d"},
    {"question_id": "8", "data_id": "1454426_2591111988", "data_type": "image",
     "question": "How many lamps are there?", "answer": "B", "question_type_id": 5,
     "choice_a": "0", "choice_b": "1", "choice_c": "2", "choice_d": "3"},
]  # fmt: skip


def seed_choices(row: Row) -> list[str]:
    return [row[f"choice_{letter}"] for letter in "abcd"]


def seed_author(folder: Path) -> None:
    put(folder / "SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": SEED})
    for number, row in enumerate(SEED):
        if row["data_type"] == "image":
            put(folder / "SEED-Bench-image" / row["data_id"], encoded(number))


def seed_llava(folder: Path) -> None:
    seed_author(folder)
    rows = []
    for row in SEED:
        image = row["data_type"] == "image"
        name = row["question_id"]
        place = "SEED-Bench-image" if image else "SEED-Bench-video-image"
        rows.append({
            "question_id": int(name) if image else name, "image": f"{place}/{row['data_id']}",
            "text": f"{row['question']}\n{options(seed_choices(row))}{MCQ}",
            "category": "Instances Counting",
        })  # fmt: skip
    put_lines(folder / "llava-seed-bench.jsonl", rows)


def seed_parquet(folder: Path) -> None:
    rows = [
        row | {"image": [picture(number)] * (1 if row["data_type"] == "image" else 2)}
        for number, row in enumerate(SEED)
    ]
    put_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


# --------------------------------------------------------------------------------------- AI2D

# image, then question, about letters or not, options, the right one.
AI2D: list[tuple[str, list[tuple[str, bool, list[str], int]]]] = [
    ("0.png", [("What is A in the diagram?", True, ["ears", "nose", "mouth", "face"], 3),
               ("What animal is it?", False, ["cat", "dog", "cow", "fox"], 1)]),
    ("7.png", [("What eats grass?", False, ["owl", "rabbit", "fox", "grass"], 1)]),
    ("9.png", [("In training?", False, ["a", "b", "c", "d"], 0)]),
]  # fmt: skip
AI2D_TEST = ("0", "7")


def ai2d_author(folder: Path) -> None:
    for number, (image, asked) in enumerate(AI2D):
        questions = {
            text: {"abcLabel": letters, "answerTexts": texts, "correctAnswer": right,
                   "questionId": f"{image}-{i}"}
            for i, (text, letters, texts, right) in enumerate(asked)
        }  # fmt: skip
        put(folder / "questions" / f"{image}.json", {"imageName": image, "questions": questions})
        put(folder / "images" / image, encoded(number, ".png"))
        words = {"T1": {"rectangle": [[2, 2], [14, 12]], "replacementText": "A", "value": "face"}}
        put(folder / "annotations" / f"{image}.json", {"text": words})
    put(folder / "ai2d_test_ids.csv", "".join(f"{name}\n" for name in AI2D_TEST))


def ai2d_parquet(folder: Path) -> None:
    rows, shown = [], []
    for number, (image, asked) in enumerate(AI2D):
        if image.removesuffix(".png") in AI2D_TEST:
            for text, _, texts, right in asked:
                rows.append({"question": text, "options": texts, "answer": str(right)})
                shown.append(number)
    put_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, shown)


# --------------------------------------------------------------------------------------- MMMU

MMMU: list[Row] = [
    {"id": "validation_Art_Theory_1", "question": "<image 1> Who painted this?",
     "options": "['Monet', \"D'Arcy\", 'Goya']", "answer": "C",
     "question_type": "multiple-choice"},
    {"id": "validation_Art_Theory_2", "question": "Which matches <image 2>, not <image 1>?",
     "options": "['<image 3>', 'none']", "answer": "B", "question_type": "multiple-choice"},
    {"id": "validation_Math_1", "question": "What is the area in <image 1>?", "options": "[]",
     "answer": "24.32", "question_type": "open"},
    {"id": "validation_Math_2", "question": "Name it: <image 1>", "options": "[]",
     "answer": "['$MgS$', 'MgS']", "question_type": "open"},
]  # fmt: skip


def mmmu_rows() -> list[Row]:
    out = []
    for number, row in enumerate(MMMU):
        named = [k for k in range(1, 8) if f"<image {k}>" in row["question"] + row["options"]]
        images = {f"image_{k}": picture(10 * number + k) for k in named}
        out.append(row | dict.fromkeys((f"image_{k}" for k in range(1, 8)), None) | images)
    return out


def write_mmmu(path: Path, rows: Sequence[Row]) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [(name, pa.string()) for name in MMMU[0]]
    schema = pa.schema(texts + [(f"image_{k}", image) for k in range(1, 8)])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=2)


def mmmu_author(folder: Path) -> None:
    for subject in ("Art_Theory", "Math"):
        rows = [row for row in mmmu_rows() if subject in row["id"]]
        write_mmmu(folder / subject / "validation-00000-of-00001.parquet", rows)


def mmmu_parquet(folder: Path) -> None:
    write_mmmu(folder / "data" / "validation-00000-of-00001.parquet", mmmu_rows())


# ------------------------------------------------------------------------------- with a judge

VET = {
    f"v1_{number}": {"imagename": f"v1_{number}.png", "question": question, "answer": "3",
                     "imagesource": "web", "capability": ["ocr", "math"]}
    for number, question in enumerate(("What is x?", "What is d?", "Why is it funny?", "How many?"))
}  # fmt: skip


def mmvet_author(folder: Path) -> None:
    put(folder / "mm-vet.json", VET)
    put_images(folder / "images", [row["imagename"] for row in VET.values()])


def mmvet_llava(folder: Path) -> None:
    rows = [
        {"question_id": number, "image": row["imagename"], "text": row["question"],
         "category": "default"}
        for number, row in enumerate(VET.values())
    ]  # fmt: skip
    put_lines(folder / "llava-mm-vet.jsonl", rows)
    put_images(folder / "images", [row["imagename"] for row in VET.values()])


def mmvet_parquet(folder: Path) -> None:
    rows = [
        {"question_id": name, "question": row["question"], "answer": row["answer"],
         "image_source": "web", "capability": "ocr,math"}
        for name, row in VET.items()
    ]  # fmt: skip
    put_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, range(len(rows)))


WILD = [
    {"question_id": number, "image": f"00{1 + number // 2}.jpg", "text": text, "category": kind}
    for number, (text, kind) in enumerate((
        ("What is the name of this place?", "conv"), ("Describe this photo.", "detail"),
        ("Why are there no people?", "complex"), ("What is the brand?", "conv"),
    ))
]  # fmt: skip


def llava_w_author(folder: Path) -> None:
    put_lines(folder / "questions.jsonl", WILD)
    put_images(folder / "images", ["001.jpg", "002.jpg"])


def llava_w_parquet(folder: Path) -> None:
    rows = [{"question_id": row["question_id"], "question": row["text"], "caption": "a caption",
             "gpt_answer": "It is.", "category": row["category"]} for row in WILD]  # fmt: skip
    shown = [number // 2 for number in range(len(rows))]
    put_parquet(folder / "data" / "train-00000-of-00001.parquet", rows, shown)


MINIATURES: dict[str, Callable[[Path], None]] = {
    "scienceqa/author": scienceqa_author,
    "scienceqa/llava": scienceqa_llava,
    "scienceqa/parquet": scienceqa_parquet,
    "pope/author": pope_author,
    "pope/llava": pope_llava,
    "pope/parquet": pope_parquet,
    "mme/author": mme_author,
    "mme/llava": mme_llava,
    "mme/parquet": mme_parquet,
    "mmbench/author": mmbench_author,
    "mmbench/parquet": mmbench_parquet,
    "mmbench_cn/author": partial(mmbench_author, language="cn"),
    "mmbench_cn/parquet": partial(mmbench_parquet, language="cn"),
    "seed/author": seed_author,
    "seed/llava": seed_llava,
    "seed/parquet": seed_parquet,
    "ai2d/author": ai2d_author,
    "ai2d/parquet": ai2d_parquet,
    "mmmu/author": mmmu_author,
    "mmmu/parquet": mmmu_parquet,
    "mmvet/author": mmvet_author,
    "mmvet/llava": mmvet_llava,
    "mmvet/parquet": mmvet_parquet,
    "llava_w/author": llava_w_author,
    "llava_w/parquet": llava_w_parquet,
}
