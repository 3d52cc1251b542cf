"""Progress over many samples on stderr, with rate and time left."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class SampleMeter:
    """Called as `meter(done, total)`: a bar on a terminal, otherwise a line every tenth.

    What was done before the first call counts for neither rate nor time left.
    """

    def __init__(self, name: str, stream: TextIO | None = None):
        self.name, self.stream = name, stream or sys.stderr
        self.first: tuple[int, float] | None = None
        self.told = -1
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        text = speed(done - self.first[0], total - done, now - self.first[1])
        if self.stream.isatty():
            self.show(done, total, text)
        elif done == total or 10 * done // total > self.told:
            joined = ", ".join(part for part in (f"{self.name} {done}/{total}", text) if part)
            print(joined, file=self.stream, flush=True)
        self.told = 10 * done // total

    def show(self, done: int, total: int, text: str) -> None:
        """Move the bar, made at the first call."""
        if self.bar is None:
            columns = TextColumn(self.name), BarColumn(), MofNCompleteColumn()
            told = TextColumn("{task.fields[text]}")
            self.bar = Progress(*columns, told, console=Console(file=self.stream))
            self.task = self.bar.add_task(self.name, total=total, completed=done, text="")
            self.bar.start()
        assert self.task is not None
        self.bar.update(self.task, completed=done, text=text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def speed(done: int, left: int, seconds: float) -> str:
    """`12.3 samples/s, 0:01:05 left`; "" before anything is done."""
    if done < 1 or seconds <= 0:
        return ""
    minutes, rest = divmod(round(left * seconds / done), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{done / seconds:.2f} samples/s, {hours}:{minutes:02}:{rest:02} left"
