"""Timing of several sides in turns: what else the machine does harms all of them alike, so their ratios hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of each side, in `rounds` rounds of one call each, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> str:
    """Median, extremes and number, as every benchmark prints them."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"median {median:10,.2f}  min {low:10,.2f}  max {high:10,.2f}  n {len(values)}"
