"""Recorded metrics of benchmarks: scores item by item, parsed texts and aggregates."""

from collections.abc import Callable, Mapping

import numpy as np

from focus_jax.golden import metrics_choice, metrics_open
from focus_jax.golden.case import Recorded

# No array is an input: what is given lies in items.json.
GIVEN = r"(?!)"
CASES: Mapping[str, Callable[[Recorded], Mapping[str, np.ndarray]]] = {
    **metrics_open.CASES,
    **metrics_choice.CASES,
}


def replay(case: Recorded) -> Mapping[str, np.ndarray]:
    """Our arrays of a case. ValueError: a metric that is not known, or whatever differs first."""
    return CASES[metric_of(case)](case)


def metric_of(case: Recorded) -> str:
    """The metric of a case, by its directory: `pope`, or a name that begins or ends with that."""
    name = case.directory.resolve().name
    fits = [key for key in CASES if name.startswith(key) or name.endswith(key)]
    if not fits:
        raise ValueError(f"{name} is no metric: name the directory after {', '.join(CASES)}")
    return max(fits, key=len)
