"""The metrics of a run: a JSON-lines file, TensorBoard events, and progress on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

_LINES_PER_RUN = 10


class Tracker:
    """Logs a run's metrics to `workdir/metrics.jsonl` and `workdir/tensorboard`, from process 0.

    A run that resumes passes its `start_step`: later steps of the interrupted run are dropped, so
    that no step appears twice. Progress goes to stderr, a bar on a terminal and otherwise a line
    every tenth of the run; `quiet` leaves it out. On other processes every call does nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        total_steps: int,
        name: str,
        start_step: int = 0,
        quiet: bool = False,
    ):
        if not 0 <= start_step <= total_steps:
            raise ValueError(
                f"start_step is {start_step} of {total_steps} steps; it must lie within them"
            )
        self.active = jax.process_index() == 0
        if not self.active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_after(path, start_step)
        self._lines: TextIO = path.open("a", buffering=1, encoding="utf-8")
        # purge_step hides the interrupted run's later events from TensorBoard.
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._progress = None if quiet else _progress(name, total_steps, start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, counted from 1; anything that `float` takes.

        In the file a value that is not finite is written as text ("nan"), for JSON has no such
        number.
        """
        if not self.active:
            return
        values = {key: float(value) for key, value in metrics.items()}
        written = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._lines.write(json.dumps({"step": int(step), **written}) + "\n")
        for key, value in values.items():
            self._events.add_scalar(key, value, int(step))
        if self._progress is not None:
            self._progress.show(int(step), values)

    def close(self) -> None:
        """Close the files and the bar; closing twice is fine."""
        if self.active:
            self.active = False
            self._lines.close()
            self._events.close()
            if self._progress is not None:
                self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _drop_after(path: Path, step: int) -> None:
    # Rewrites the file without steps after `step`, and without a last line that a kill cut short.
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}; remove that line") from error
        if record["step"] <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class _Pace:
    """Steps per second since the first step seen, and the seconds left."""

    # The first step compiles, so the clock starts when it is done.
    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int) -> tuple[float, float]:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step or now <= first_time:
            return math.nan, math.nan
        rate = (step - first_step) / (now - first_time)
        return rate, (self.total_steps - step) / rate


class _Lines:
    """One plain line every tenth of the run."""

    def __init__(self, name: str, total_steps: int, start_step: int, stream: TextIO):
        self._name = name
        self._pace = _Pace(total_steps)
        self._every = max(1, total_steps // _LINES_PER_RUN)
        self._next = min(start_step + 1, total_steps)
        self._stream = stream

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        rate, left = self._pace(step)
        if step < self._next:
            return
        total = self._pace.total_steps
        self._next = min((step // self._every + 1) * self._every, max(total, step + 1))
        text = f"{self._name} {step}/{total}{_loss(metrics)}{_speed(rate, left)}"
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A rich progress bar."""

    def __init__(self, name: str, total_steps: int, start_step: int, stream: TextIO):
        self._pace = _Pace(total_steps)
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(*columns, console=Console(file=stream))
        self._task = self._progress.add_task(name, total=total_steps, completed=start_step, text="")
        self._progress.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        text = (_loss(metrics) + _speed(*self._pace(step))).removeprefix(", ")
        self._progress.update(self._task, completed=step, text=text)

    def close(self) -> None:
        self._progress.stop()


def _progress(name: str, total_steps: int, start_step: int) -> _Lines | _Bar:
    kind = _Bar if sys.stderr.isatty() else _Lines
    return kind(name, total_steps, start_step, sys.stderr)


def _loss(metrics: Mapping[str, float]) -> str:
    return f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""


def _speed(rate: float, left: float) -> str:
    if math.isnan(rate):
        return ""
    speed = f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s/step"
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    return f", {speed}, {hours}:{minutes:02}:{seconds:02} left"
