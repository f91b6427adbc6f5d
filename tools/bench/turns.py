"""Runs that take turns in one process, so that whatever else the machine does strikes all of them.

What is compared are ratios within one turn; their median is shown with the middle half of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Times = Mapping[str, list[float]]
"""Milliseconds of each run, turn by turn."""


def taken(
    runs: Mapping[str, Callable[[], Any]],
    turns: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Milliseconds of each run in each turn, without the first ``warm_up`` turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(turns + warm_up):
        for name, run in runs.items():
            start = clock()
            run()
            if number >= warm_up:
                times[name].append(1e3 * (clock() - start))
    return times


def median(times: Times, name: str) -> float:
    """The median of a run's milliseconds."""
    return statistics.median(times[name])


def ratio(times: Times, name: str, to: str) -> tuple[float, float, float]:
    """Median of a run's time over another's in the same turn, and the ends of the middle half."""
    found = [one / other for one, other in zip(times[name], times[to], strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    return middle, low, high


def shown(found: tuple[float, float, float]) -> str:
    """A ratio with its spread, for a table."""
    middle, low, high = found
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
