"""A sign of life at steady intervals, whatever the devices do: a small file, and a line of text.

It comes from a thread of its own. In a run that hangs the step stands still, `since_step` grows and
`time` goes on; in one that was killed, `time` stands still too.
"""

import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from focus_jax.workdir import write_text

Fields = dict[str, Any]
_PLAIN = re.compile(r"[\w.:/+-]+")


class Heartbeat:
    """Tells every `seconds` how far a run is, from a thread, inside a `with`; 0 seconds: never.

    Each process writes a file of its own in the workdir, `heartbeat.json`, from process 1 on
    `heartbeat-1.json`. Process 0 also prints a line of `key=value` pairs to stderr, unless `quiet`
    or on a terminal, where there is a progress bar. A beat comes at the start and at the end too.
    """

    def __init__(
        self,
        workdir: Path,
        seconds: float,
        total: int,
        start: int = 0,
        quiet: bool = False,
        clock: Callable[[], float] = time.time,
    ):
        self.seconds, self.total, self.clock = seconds, total, clock
        self.process = jax.process_index()
        name = f"heartbeat-{self.process}.json" if self.process else "heartbeat.json"
        self.path = workdir / name
        self.loud = self.process == 0 and not quiet and not sys.stderr.isatty()
        self.fixed = {
            "process": self.process, "processes": jax.process_count(),
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        # Replaced as a whole, so that the thread never sees half of an update.
        self.now: tuple[float, Fields] = (clock(), {"step": start, "total": total})
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def update(self, step: int, **values: float | str | None) -> None:
        """Note a step that is done, and what is known of it; None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        self.now = (self.clock(), {"step": step, "total": self.total, **known})

    def beat(self, state: str = "running") -> Fields:
        """Write the file and print the line; returns their fields."""
        now, (since, values) = self.clock(), self.now
        fields = {
            "time": f"{datetime.fromtimestamp(now, UTC):%Y-%m-%dT%H:%M:%SZ}",
            "state": state, **values, "since_step": round(now - since, 1), **self.fixed,
        }  # fmt: skip
        try:
            write_text(self.path, json.dumps({n: in_json(v) for n, v in fields.items()}) + "\n")
        except OSError as error:
            # The run need not end for it: what it must write, it complains about itself.
            print(f"heartbeat: {self.path} is not written: {error}", file=sys.stderr, flush=True)
        if self.loud:
            print(line_of(fields), file=sys.stderr, flush=True)
        return fields

    def _run(self) -> None:
        while not self.stop.wait(self.seconds):
            self.beat()

    def __enter__(self) -> Self:
        if self.seconds:
            self.beat()
            self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.seconds:
            self.stop.set()
            self.thread.join()
            self.beat("done" if kind is None else "stopped")


def line_of(fields: Mapping[str, Any]) -> str:
    """`heartbeat time=2026-01-31T12:00:00Z step=120 loss=0.73`; odd words stand in quotes."""
    return " ".join(["heartbeat", *(f"{name}={word(value)}" for name, value in fields.items())])


def word(value: Any) -> str:
    """A value without spaces: six digits of a number, a string as it is or in JSON's quotes."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text).replace(" ", "\\u0020")


def in_json(value: Any) -> Any:
    """A value that JSON has: numbers that are not finite as text ("nan")."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
