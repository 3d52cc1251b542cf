"""What a long run tells while it works: pieces done, and the time left."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """Tells on stderr what is done, and the time left by the mean of what was done of each kind."""

    planned: dict[str, int]
    spent: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0

    def __call__(self, kind: str, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; its time counts unless it found everything done."""
        start = time.perf_counter()
        out = work()
        took = time.perf_counter() - start
        self.spent.setdefault(kind, []).append(took)
        self.done += 1
        total = sum(self.planned.values())
        line = f"{self.done}/{total} {name}: {took:.1f} s, {minutes(self.left())} left"
        print(line, file=sys.stderr, flush=True)
        return out

    def left(self) -> float:
        """Seconds, by the median of each kind; of kinds not begun by that of all."""
        everything = [seconds for took in self.spent.values() for seconds in took]
        typical = statistics.median(everything)
        total = 0.0
        for kind, count in self.planned.items():
            took = self.spent.get(kind, [])
            total += max(count - len(took), 0) * (statistics.median(took) if took else typical)
        return total


def minutes(seconds: float) -> str:
    """`0:02:05`."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole // 60}:{whole % 60:02}:{rest:02}"
