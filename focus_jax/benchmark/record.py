"""Measurements as JSON lines: a run that was killed goes on where it stopped."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Record:
    """Lines in memory, and in a file where a path is given; what is there already is read.

    The first line holds the settings that all others depend on. ValueError: a file of other ones,
    or one that is no record.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self.path = path
        self.lines: list[Line] = []
        first = json.loads(json.dumps(dict(settings)))  # tuples as they come back
        if path is None or not path.exists():
            self.write({"settings": first})
            return
        stored, whole = read_lines(path)
        if not stored or "settings" not in stored[0]:
            raise ValueError(f"{path} is no record of measurements: choose another --out")
        check_settings(path, stored[0]["settings"], first)
        self.lines = stored[1:]
        os.truncate(path, whole)

    def write(self, line: Line) -> None:
        """Append to the file, at once."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add(self, line: Line) -> None:
        """One more measurement."""
        self.lines.append(line)
        self.write(line)

    def find(self, **key: Any) -> list[Line]:
        """The lines that say all of `key`."""
        return [line for line in self.lines if key.items() <= line.items()]


def read_lines(path: Path) -> tuple[list[Line], int]:
    """The whole lines of a file and how many bytes they take: the last one may be torn."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in data[:whole].splitlines()], whole
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no record of measurements: choose another --out") from error


def check_settings(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """ValueError naming the first setting that differs."""
    for name in [*asked, *(name for name in stored if name not in asked)]:
        if stored.get(name) != asked.get(name):
            raise ValueError(
                f"{path} holds measurements of other settings: {name} was {stored.get(name)}, is "
                f"{asked.get(name)}; choose another --out, or remove the file"
            )


def machine() -> dict[str, Any]:
    """What the measurements were taken on."""
    import jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": device.platform,
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def processor() -> str:
    """The CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or "unknown"
