"""Answers on disk, a line each, in a file that a run which was killed goes on with.

LLaVA's answer rows. Beside the file lies another of the same name in JSON with the settings that
the answers depend on: answers of other settings are never mixed with these.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_jax.evaluate.benchmark import Protocol, Sample
from focus_jax.evaluate.study import write_json
from focus_jax.workdir import write_text

Row = dict[str, Any]
Settings = dict[str, Any]
# Of rows whose image could not be read: these are asked again.
UNREADABLE = "unreadable"


def answers_file(folder: Path, benchmark: str, protocol: Protocol, method: Mapping) -> Path:
    """Where a benchmark's answers with a method (as JSON values) lie in a folder of answers."""
    words = json.dumps(method, sort_keys=True)
    digest = hashlib.sha256(words.encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.=+-]+", "_", str(method["name"]))[:60]
    return folder / f"{benchmark}_{protocol}_{name}_{digest}.jsonl"


def settings_file(path: Path) -> Path:
    """The file beside an answer file."""
    return path.with_suffix(".json")


def resume(path: Path, settings: Settings, samples: Sequence[Sample]) -> dict[str, Row]:
    """The rows that are there, by question; the file is made, or mended, so that it can grow.

    A last line that a kill cut short goes, and so do rows whose image could not be read.
    ValueError: answers of other settings or prompts, or a line that is no answer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, settings = settings_file(path), json.loads(json.dumps(settings))
    if beside.exists():
        check_same(beside, settings)
    elif path.exists() and path.stat().st_size:
        raise ValueError(
            f"{path} has no {beside.name} beside it that says what its answers are of: move it "
            "away, or give another folder (--out)"
        )
    else:
        write_json(beside, {"settings": settings})
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = read_rows(path, text)
    check_prompts(path, found, samples)
    asked = {sample.id for sample in samples}
    again = [note(row) == UNREADABLE and row["question_id"] in asked for row in found]
    kept = {row["question_id"]: row for row, out in zip(found, again, strict=True) if not out}
    mended = "".join(map(line, kept.values()))
    if mended != text:
        write_text(path, mended)
    return kept


def note(row: Row) -> str:
    """Why a row has no answer; "" where it has one."""
    return row["metadata"].get("note", "")


def check_same(beside: Path, settings: Settings) -> None:
    """ValueError naming the first setting that differs from those that are stored."""
    stored = read_json(beside).get("settings")
    found = difference(stored, settings)
    if found:
        name, old, new = found
        raise ValueError(
            f"{beside.with_suffix('.jsonl')} holds answers of other settings: {name} was {old!r}, "
            f"is {new!r}; give another folder (--out), or move both files away"
        )


def difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(name, old, new) of the first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            place = f"{name}.{key}" if name else key
            found = difference(old.get(key), new.get(key), place)
            if found:
                return found
        return None
    return None if old == new else (name or "settings", old, new)


def read_json(path: Path) -> dict[str, Any]:
    """A file of ours. ValueError where it was damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): move it away") from error
    return value if isinstance(value, dict) else {}


def read_rows(path: Path, text: str) -> list[Row]:
    """All whole rows. ValueError for a line that is none, unless it is the last."""
    rows = []
    lines = text.removesuffix("\n").split("\n") if text else []  # answers hold other line breaks
    for number, words in enumerate(lines, 1):
        try:
            row = json.loads(words)
            row["question_id"], row["text"], row["metadata"]["score"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is no answer ({error}): remove that line") from error
        rows.append(row)
    return rows


def check_prompts(path: Path, rows: Sequence[Row], samples: Sequence[Sample]) -> None:
    """ValueError where an answer is to another prompt than the sample's."""
    asked = {sample.id: sample.prompt for sample in samples}
    for row in rows:
        now = asked.get(row["question_id"], row["prompt"])
        if now != row["prompt"]:
            raise ValueError(
                f"{path} holds answers to other prompts: that of question {row['question_id']} was "
                f"{row['prompt']!r}, is {now!r}; give another folder (--out), or move the file away"
            )


def append(path: Path, rows: Sequence[Row]) -> None:
    """Write rows so that they outlive whatever happens next."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(line, rows))
        file.flush()
        os.fsync(file.fileno())


def finish(path: Path, rows: Mapping[str, Row], order: Sequence[str], outcome: Any) -> None:
    """Rewrite the file in the samples' order, others behind; `outcome` goes beside the settings."""
    ordered = {name: rows[name] for name in order} | dict(rows)
    write_text(path, "".join(map(line, ordered.values())))
    beside = settings_file(path)
    write_json(beside, {"settings": read_json(beside)["settings"], "outcome": outcome})


def outcome_of(path: Path) -> dict[str, Any]:
    """What `finish` wrote, {} before it did."""
    beside = settings_file(path)
    return (read_json(beside).get("outcome") or {}) if beside.exists() else {}


def line(row: Row) -> str:
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Numbers that JSON does not have become null: an answer may be read as "nan"."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
