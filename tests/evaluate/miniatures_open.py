"""Open-ended benchmarks of a few questions, written as their authors, LLaVA and lmms-eval do.

The same content in every layout that can hold it. Each function writes a benchmark's own folder.
"""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Row = dict[str, Any]
SHORT = "\nAnswer the question using a single word or phrase."
PROVIDED = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def encoded(number: int, suffix: str = ".jpg") -> bytes:
    """A small image of its own size and colours."""
    width, height = [(32, 24), (20, 40), (48, 16), (17, 17), (64, 30)][number % 5]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG" if suffix == ".png" else "JPEG")
    return out.getvalue()


def put(path: Path, content: bytes | str | list | dict) -> None:
    """A file, and the folders above it; lists and objects as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_images(folder: Path, names: Sequence[str]) -> None:
    """Images by number, in the format of their suffix."""
    for number, name in enumerate(names):
        put(folder / name, encoded(number, Path(name).suffix))


def put_lines(path: Path, rows: Sequence[Row]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def put_parquet(path: Path, rows: Sequence[Row], images: Sequence[int] | None = None) -> None:
    """A shard as the hub has them, two rows a group; `images`: numbers of the rows' images."""
    if images is not None:
        rows = [
            row | {"image": {"bytes": encoded(number), "path": None}}
            for row, number in zip(rows, images, strict=True)
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)


def asked(key: Any, image: str, text: str) -> Row:
    """A line of LLaVA's question files."""
    return {"question_id": key, "image": image, "text": text, "category": "default"}


def ten(*counts: tuple[str, int]) -> list[str]:
    """Ten people's answers."""
    return [answer for answer, count in counts for _ in range(count)]


# ------------------------------------------------------------------------------------ VQAv2

VQA_IMAGES = (42, 262144)
VQA: list[Row] = [
    {"question_id": 42000, "image_id": 42, "question": "Is it sunny?",
     "answer_type": "yes/no", "answers": ten(("yes", 8), ("no", 2))},
    {"question_id": 42001, "image_id": 42, "question": "How many dogs are there?",
     "answer_type": "number", "answers": ten(("2", 7), ("3", 2), ("two dogs", 1))},
    {"question_id": 262144000, "image_id": 262144, "question": "What is on the table?",
     "answer_type": "other", "answers": ten(("cup", 2), ("a mug", 8))},
    {"question_id": 262144005, "image_id": 262144, "question": "Who's that?",
     "answer_type": "other", "answers": ten(("man", 9), ("don't know", 1))},
]  # fmt: skip


def vqa_annotation(row: Row) -> Row:
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(row["answers"], 1)
    ]
    return {
        "question_id": row["question_id"], "image_id": row["image_id"], "answers": people,
        "question_type": "what", "answer_type": row["answer_type"],
        "multiple_choice_answer": row["answers"][0],
    }  # fmt: skip


def vqav2_author(folder: Path) -> None:
    asks = [{k: row[k] for k in ("image_id", "question", "question_id")} for row in VQA]
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": asks})
    notes = [vqa_annotation(row) for row in reversed(VQA)]
    put(folder / "v2_mscoco_val2014_annotations.json", head | {"annotations": notes})
    put_images(folder / "val2014", [f"COCO_val2014_{image:012}.jpg" for image in VQA_IMAGES])


def vqav2_llava(folder: Path) -> None:
    rows = [
        asked(
            row["question_id"], f"COCO_test2015_{row['image_id']:012}.jpg", row["question"] + SHORT
        )
        for row in VQA
    ]
    put_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    more = asked(7003, "COCO_test2015_000000000007.jpg", "Where?" + SHORT)
    put_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", [more, *rows])
    put_images(folder / "test2015", [f"COCO_test2015_{image:012}.jpg" for image in VQA_IMAGES])


def vqav2_parquet(folder: Path) -> None:
    rows = [vqa_annotation(row) | {"question": row["question"]} for row in VQA]
    for part in (0, 1):
        name = f"data/validation-{part:05}-of-00002.parquet"
        images = [VQA_IMAGES.index(row["image_id"]) for row in VQA[2 * part : 2 * part + 2]]
        put_parquet(folder / name, rows[2 * part : 2 * part + 2], images)


# -------------------------------------------------------------------------------------- GQA

GQA_IMAGES = ("n161313", "n288870")
GQA = {
    "201307251": ("n161313", "Is it overcast?", "no"),
    "201640614": ("n161313", "Who is wearing the dress?", "woman"),
    "202225914": ("n288870", "What color is the helmet?", "light blue"),
    "20602949": ("n288870", "Are there fences in front of the car?", "yes"),
}
GQA_FILE = "testdev_balanced_questions.json"


def gqa_rows() -> dict[str, Row]:
    return {
        key: {
            "imageId": image, "question": text, "answer": answer, "isBalanced": True,
            "fullAnswer": f"It is {answer}.", "types": {"detailed": "x"}, "semantic": [],
        }
        for key, (image, text, answer) in GQA.items()
    }  # fmt: skip


def gqa_author(folder: Path) -> None:
    put(folder / "questions1.2" / GQA_FILE, gqa_rows())
    put_images(folder / "images", [f"{image}.jpg" for image in GQA_IMAGES])


def gqa_llava(folder: Path) -> None:
    put(folder / "data" / GQA_FILE, gqa_rows())
    put_images(folder / "data" / "images", [f"{image}.jpg" for image in GQA_IMAGES])
    rows = [asked(key, f"{image}.jpg", text + SHORT) for key, (image, text, _) in GQA.items()]
    put_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)


def gqa_parquet(folder: Path) -> None:
    name = "testdev-00000-of-00001.parquet"
    rows = [
        {"id": key, "imageId": image, "question": text, "answer": answer, "isBalanced": True}
        for key, (image, text, answer) in GQA.items()
    ]
    put_parquet(folder / "testdev_balanced_instructions" / name, rows)
    # In another order than the questions'.
    shown = [{"id": image} for image in reversed(GQA_IMAGES)]
    put_parquet(folder / "testdev_balanced_images" / name, shown, [1, 0])


# ----------------------------------------------------------------------------------- VizWiz

VIZWIZ: list[Row] = [
    {"question": "What is this? And what color is it?", "answers": ten(("soda", 6), ("can", 4))},
    {"question": "what does the label say", "answers": ten(("unanswerable", 9), ("label", 1))},
    {"question": "Is the oven on?", "answers": ten(("no", 5), ("yes", 3), ("unsuitable", 2))},
    {"question": "Which one is the 5 dollar bill?", "answers": ten(("left.", 4), ("left", 6))},
]


def vizwiz_names(split: str) -> list[str]:
    return [f"VizWiz_{split}_{number:08}.jpg" for number in range(len(VIZWIZ))]


def vizwiz_author(folder: Path) -> None:
    rows = [
        {
            "image": name, "question": row["question"], "answer_type": "other", "answerable": 1,
            "answers": [{"answer": a, "answer_confidence": "yes"} for a in row["answers"]],
        }
        for name, row in zip(vizwiz_names("val"), VIZWIZ, strict=True)
    ]  # fmt: skip
    put(folder / "val.json", rows)
    put_images(folder / "val", vizwiz_names("val"))


def vizwiz_llava(folder: Path) -> None:
    names = vizwiz_names("test")
    texts = [row["question"].capitalize() + PROVIDED + SHORT for row in VIZWIZ]
    rows = [asked(i, *pair) for i, pair in enumerate(zip(names, texts, strict=True))]
    put_lines(folder / "llava_test.jsonl", rows)
    tests = zip(names, VIZWIZ, strict=True)
    put(folder / "test.json", [{"image": n, "question": row["question"]} for n, row in tests])
    put_images(folder / "test", names)


def vizwiz_parquet(folder: Path) -> None:
    names = [name.removesuffix(".jpg") for name in vizwiz_names("val")]
    rows = [
        {"question_id": name, "category": "other", **row}
        for name, row in zip(names, VIZWIZ, strict=True)
    ]
    put_parquet(folder / "data" / "val-00000-of-00001.parquet", rows, range(len(rows)))


# ---------------------------------------------------------------------------------- TextVQA

TEXT_IMAGES = ("003a8ae2ef43b901", "4dc59c7e57fa8968")
TEXT_TOKENS = {TEXT_IMAGES[0]: ["DAKOTA", "DIGITAL", "5."], TEXT_IMAGES[1]: []}
TEXT: list[Row] = [
    {"question_id": 34602, "image_id": TEXT_IMAGES[0], "question": "what brand is this camera?",
     "answers": ten(("dakota", 8), ("dakota digital", 2))},
    {"question_id": 34603, "image_id": TEXT_IMAGES[0], "question": "what number is on it?",
     "answers": ten(("5", 10))},
    {"question_id": 34604, "image_id": TEXT_IMAGES[1], "question": "Are these on or OFF?",
     "answers": ten(("off", 7), ("on", 2), ("yes", 1))},
    {"question_id": 34605, "image_id": TEXT_IMAGES[1], "question": "what does it say?",
     "answers": ten(("answering does not require reading text in the image", 10))},
]  # fmt: skip


def textvqa_author(folder: Path) -> None:
    put(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": TEXT})
    read = [{"image_id": key, "ocr_tokens": tokens} for key, tokens in TEXT_TOKENS.items()]
    put(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": read})
    put_images(folder / "train_images", [f"{image}.jpg" for image in TEXT_IMAGES])


def textvqa_llava(folder: Path) -> None:
    put(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": TEXT})
    rows = []
    for row in TEXT:
        image, tokens = row["image_id"], ", ".join(TEXT_TOKENS[row["image_id"]])
        text = f"{row['question'].capitalize()}\nReference OCR token: {tokens}{SHORT}"
        rows.append(asked(image, f"{image}.jpg", text))
    put_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    put_images(folder / "train_images", [f"{image}.jpg" for image in TEXT_IMAGES])


def textvqa_parquet(folder: Path) -> None:
    rows = [row | {"ocr_tokens": TEXT_TOKENS[row["image_id"]], "set_name": "val"} for row in TEXT]
    images = [TEXT_IMAGES.index(row["image_id"]) for row in TEXT]
    put_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows, images)


# --------------------------------------------------------------- documents and infographics

DOCUMENTS: list[Row] = [
    {"questionId": 49153, "question": "What is the actual value per 1000?", "page": 0,
     "answers": ["0.28"]},
    {"questionId": 24580, "question": "What is name of university?", "page": 0,
     "answers": ["university of california", "University of California"]},
    {"questionId": 57349, "question": "What is the company name?", "page": 1,
     "answers": ["itc limited", "ITC"]},
    {"questionId": 65542, "question": "To whom is it sent?", "page": 1, "answers": ["Paul"]},
]  # fmt: skip
PAGES = (("pybv0228", "81"), ("snbx0223", "17"))
GRAPHICS = ("20471.jpeg", "31337.png")


def docvqa_author(folder: Path) -> None:
    rows = []
    for row in DOCUMENTS:
        document, page = PAGES[row["page"]]
        rows.append({
            "questionId": row["questionId"], "question": row["question"],
            "image": f"documents/{document}_{page}.png", "docId": 1, "data_split": "val",
            "ucsf_document_id": document, "ucsf_document_page_no": page,
            "answers": row["answers"], "question_types": ["form"],
        })  # fmt: skip
    put(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": rows})
    put_images(folder / "documents", [f"{document}_{page}.png" for document, page in PAGES])


def docvqa_parquet(folder: Path) -> None:
    rows = [
        {
            "questionId": str(row["questionId"]), "question": row["question"], "docId": 1,
            "answers": row["answers"], "ucsf_document_id": PAGES[row["page"]][0],
            "ucsf_document_page_no": PAGES[row["page"]][1], "data_split": "val",
        }
        for row in DOCUMENTS
    ]  # fmt: skip
    name = "DocVQA/validation-00000-of-00001.parquet"
    put_parquet(folder / name, rows, [row["page"] for row in DOCUMENTS])


def info_url(row: Row) -> str:
    return f"https://example.org/{row['page']}"


def infovqa_author(folder: Path) -> None:
    rows = [
        {
            "questionId": row["questionId"], "question": row["question"],
            "image_local_name": GRAPHICS[row["page"]], "image_url": info_url(row),
            "answers": row["answers"], "data_split": "val", "ocr_output_file": "0.json",
        }
        for row in DOCUMENTS
    ]  # fmt: skip
    put(folder / "infographicsVQA_val_v1.0_withQT.json", {"data": rows})
    put_images(folder / "infographicsvqa_images", GRAPHICS)


def infovqa_parquet(folder: Path) -> None:
    rows = [
        {
            "questionId": str(row["questionId"]), "question": row["question"],
            "answers": row["answers"], "image_url": info_url(row), "data_split": "val",
        }
        for row in DOCUMENTS
    ]  # fmt: skip
    name = "InfographicVQA/validation-00000-of-00001.parquet"
    put_parquet(folder / name, rows, [row["page"] for row in DOCUMENTS])


# ---------------------------------------------------------------------------------- ChartQA

CHARTS = ("41699051005347.png", "1366.png")
CHART: dict[str, list[tuple[int, str, str]]] = {
    "human": [(0, "How many food items are shown?", "14"), (0, "What is the share?", "23%")],
    "augmented": [(1, "What was the value in 2019?", "0"), (1, "Which country leads?", "Peru")],
}


def chartqa_author(folder: Path) -> None:
    for kind, rows in CHART.items():
        named = [{"imgname": CHARTS[i], "query": ask, "label": gold} for i, ask, gold in rows]
        put(folder / "test" / f"test_{kind}.json", named)
    put_images(folder / "test" / "png", CHARTS)


def chartqa_parquet(folder: Path) -> None:
    both = [(kind, *row) for kind, rows in CHART.items() for row in rows]
    rows = [{"type": f"{kind}_test", "question": ask, "answer": g} for kind, _, ask, g in both]
    name = "data/test-00000-of-00001.parquet"
    put_parquet(folder / name, rows, [number for _, number, _, _ in both])


# --------------------------------------------------------------------------------- OCRBench

OCR: list[Row] = [
    {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "image_path": "IIIT5K/918.png",
     "question": "what is written in the image?", "answers": "CENTRE"},
    {"dataset_name": "textVQA", "type": "Scene Text-centric VQA", "image_path": "textVQA/1.jpg",
     "question": "what is the time?", "answers": ["10:10", "ten past ten"]},
    {"dataset_name": "docVQA", "type": "Doc-oriented VQA", "image_path": "docVQA/3.png",
     "question": "Who signed?", "answers": "Mr. Lee"},
    {"dataset_name": "FUNSD", "type": "Key Information Extraction", "image_path": "FUNSD/0.png",
     "question": "What is the date?", "answers": "12/3"},
    {"dataset_name": "HME100k", "type": "Handwritten Mathematical Expression Recognition",
     "image_path": "HME100k/5.jpg", "question": "Write the expression in LaTeX.",
     "answers": ["X ^ { 2 }", "X^2"]},
]  # fmt: skip


def ocrbench_author(folder: Path) -> None:
    put(folder / "OCRBench.json", [row | {"id": 0} for row in OCR])
    put_images(folder / "OCRBench_Images", [row["image_path"] for row in OCR])


def ocrbench_parquet(folder: Path) -> None:
    rows = []
    for row in OCR:
        answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
        rows.append({
            "dataset": row["dataset_name"], "question": row["question"],
            "question_type": row["type"], "answer": answers,
        })  # fmt: skip
    put_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, range(len(rows)))


MINIATURES: dict[str, Callable[[Path], None]] = {
    "vqav2/author": vqav2_author,
    "vqav2/llava": vqav2_llava,
    "vqav2/parquet": vqav2_parquet,
    "gqa/author": gqa_author,
    "gqa/llava": gqa_llava,
    "gqa/parquet": gqa_parquet,
    "vizwiz/author": vizwiz_author,
    "vizwiz/llava": vizwiz_llava,
    "vizwiz/parquet": vizwiz_parquet,
    "textvqa/author": textvqa_author,
    "textvqa/llava": textvqa_llava,
    "textvqa/parquet": textvqa_parquet,
    "textvqa_ocr/author": textvqa_author,
    "textvqa_ocr/llava": textvqa_llava,
    "textvqa_ocr/parquet": textvqa_parquet,
    "docvqa/author": docvqa_author,
    "docvqa/parquet": docvqa_parquet,
    "infovqa/author": infovqa_author,
    "infovqa/parquet": infovqa_parquet,
    "chartqa/author": chartqa_author,
    "chartqa/parquet": chartqa_parquet,
    "ocrbench/author": ocrbench_author,
    "ocrbench/parquet": ocrbench_parquet,
}
