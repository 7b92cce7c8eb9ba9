"""Which layout of a model answers the most requests while 99 of 100 are answered in time.

    python -m operate tune lenet5-digits --p99-ms 50

A layout is a number of workers, a batch size, a batch delay and a number of threads. The search begins with
TorchServe's own default and the corners, and then goes from the best to its neighbours as long as that helps. The
threads are left to the workers meanwhile; in the end the best layout is tried with other numbers of them. In each
layout a closed loop asks with 1, 2, 4, ... clients. What is chosen has kept the bound again, with a fifth of it to
spare, in fresh workers, in every one of three longer rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from client.errors import NotReady, RequestRefused
from client.torchserve import TorchServe
from handler.torchserve_defaults import BATCH_DELAY_MS, BATCH_SIZE
from operate.errors import BoundNotMet
from operate.tuning import layouts
from operate.tuning.layouts import Layout
from operate.tuning.load import LoadResult, load

_CLIENTS = (1, 2, 4, 8, 16, 32, 64)
_DELAYS_MS = (1, 2, 5, 10, 20, 50)
_MOST_BATCH_SIZE = 64
_CORNER_BATCH_SIZE, _CORNER_DELAY_MS = 8, 5
_HEADROOM = 0.8
_WARM_UP_SHARE = 0.25
_WORSE_IN_A_ROW = 2
_ROUNDS, _ROUND_LENGTH, _ROUND_REQUESTS, _LONGEST_ROUND_S = 3, 2, 300, 60.0
_THREAD_LAYOUTS = 2


@dataclass(frozen=True)
class Measured:
    """One layout under one load."""

    layout: Layout
    clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    threads: int | None = None
    """That a worker took; None where its handler does not tell and cannot be told."""

    def holds(self, bound_ms: float) -> bool:
        return self.failed == 0 and self.p99_ms <= bound_ms

    def is_safe(self, bound_ms: float) -> bool:
        """What just keeps the bound once will break it another time."""
        return self.holds(_HEADROOM * bound_ms)


Climb = Callable[[Layout], Measured]
Again = Callable[[Measured], Measured]


@dataclass(frozen=True)
class Tuning:
    """What was found."""

    chosen: Measured
    """The slowest requests/s and the longest p99 of the rounds that it was measured again in."""
    default: Measured | None
    """TorchServe's default layout, measured in the same way; None where it did not keep the bound."""

    @property
    def gain(self) -> float | None:
        """Requests/s over those of the default layout."""
        return None if self.default is None else self.chosen.requests_per_s / self.default.requests_per_s


@dataclass(frozen=True)
class Bench:
    """Measures layouts of one model.

    Args:
        archive: the model's, in the server's own model store.
        bound_ms: for the 99th percentile.
        seconds: of one measurement.
    """

    server: TorchServe
    model: str
    archive: Path
    images: Sequence[bytes]
    bound_ms: float
    seconds: float

    def climb(self, layout: Layout) -> Measured:
        """The load with the most requests/s within the bound or, where none is, the one nearest to it.

        More and more clients ask: enough to fill a batch for every worker, and on until that was no better twice.
        """
        levels: list[Measured] = []
        try:
            with layouts.registered(self.server, self.model, self.archive, layout) as version:
                threads = self.server.describe_worker(version).get("threads")
                for clients in _CLIENTS:
                    levels.append(self._measure(layout, version, clients, self.seconds))
                    worse = len(levels) - 1 - levels.index(max(levels, key=self._rank))
                    if clients >= layout.workers * layout.batch_size and worse >= _WORSE_IN_A_ROW:
                        break
        except (NotReady, RequestRefused):  # so many workers may not fit into memory
            return _not_loaded(layout)
        return replace(max(levels, key=self._rank), threads=threads)

    def again(self, best: Measured) -> Measured:
        """The worst of some longer rounds in workers that have just been started."""
        try:
            with layouts.registered(self.server, self.model, self.archive, best.layout) as version:
                threads = self.server.describe_worker(version).get("threads")
                length_s = round_s(best.requests_per_s, self.seconds)
                rounds = [self._measure(best.layout, version, best.clients, length_s) for _ in range(_ROUNDS)]
        except (NotReady, RequestRefused):
            return _not_loaded(best.layout)
        return Measured(
            best.layout,
            best.clients,
            min(each.requests_per_s for each in rounds),
            max(each.p50_ms for each in rounds),
            max(each.p99_ms for each in rounds),
            sum(each.failed for each in rounds),
            threads,
        )

    def _rank(self, measured: Measured) -> tuple[float, float]:
        if measured.is_safe(self.bound_ms):
            return 1, measured.requests_per_s
        return 0, -measured.p99_ms

    def _measure(self, layout: Layout, version: str, clients: int, length_s: float) -> Measured:
        def ask(duration_s: float) -> LoadResult:
            return load(self.server, version, self.images, clients, duration_s)

        ask(_WARM_UP_SHARE * length_s)
        result = ask(length_s)
        # With no good answer there is no percentile.
        p50_ms, p99_ms = (result.latency_ms(share) if result.latencies_ms else math.inf for share in (0.5, 0.99))
        return Measured(layout, clients, result.requests_per_s, p50_ms, p99_ms, result.failed)


def round_s(requests_per_s: float, seconds: float) -> float:
    """Length of a round in which a layout is measured again.

    Of few requests none may be among the slowest of a hundred, so a round is to have some hundreds.
    """
    return max(_ROUND_LENGTH * seconds, min(_ROUND_REQUESTS / requests_per_s, _LONGEST_ROUND_S))


def _not_loaded(layout: Layout) -> Measured:
    return Measured(layout, 0, 0.0, math.inf, math.inf, 1)


def search(climb: Climb, most_workers: int, cores: int, bound_ms: float, most_layouts: int) -> Iterator[Measured]:
    """The best load of one layout after the other, of at most so many.

    Args:
        most_workers: of a layout; where that is all cores, TorchServe's own default is the first.
        most_layouts: of which two, or a quarter of them if that is less, are kept for other numbers of threads.
    """
    found: dict[Layout, Measured] = {}
    while len(found) < most_layouts - min(_THREAD_LAYOUTS, most_layouts // 4):
        layout = next((layout for layout in _wanted(found, most_workers, bound_ms) if layout not in found), None)
        if layout is None:
            break
        found[layout] = climb(layout)
        yield found[layout]
    if safe := [best for best in found.values() if best.is_safe(bound_ms)]:
        fastest = max(safe, key=lambda best: best.requests_per_s)
        yield from map(climb, other_threads(fastest, cores)[: most_layouts - len(found)])


def choose(found: Sequence[Measured], again: Again, cores: int, bound_ms: float) -> Tuning:
    """The layout with the most requests/s that is safe now and when it is measured `again`.

    Raises:
        BoundNotMet: none does.
    """
    safe = sorted((best for best in found if best.is_safe(bound_ms)), key=lambda best: -best.requests_per_s)
    remeasured: dict[Layout, Measured] = {}
    for best in safe:
        remeasured[best.layout] = again(best)
        if remeasured[best.layout].is_safe(bound_ms):
            break
    for best in safe:
        if best.layout == default_layout(cores) and best.layout not in remeasured:
            remeasured[best.layout] = again(best)
    holding = [measured for measured in remeasured.values() if measured.is_safe(bound_ms)]
    if not holding:
        raise BoundNotMet(_explain(found, remeasured, bound_ms))
    default = next((measured for measured in holding if measured.layout == default_layout(cores)), None)
    return Tuning(max(holding, key=lambda measured: measured.requests_per_s), default)


def _explain(found: Sequence[Measured], remeasured: Mapping[Layout, Measured], bound_ms: float) -> str:
    nearest = min(remeasured.values() or found, key=lambda measured: (measured.failed, measured.p99_ms))
    return (
        f"no layout keeps a p99 of {bound_ms:g} ms with a fifth to spare: the nearest was {nearest.p99_ms:.1f} ms with "
        f"{nearest.clients} clients and {nearest.failed} failed requests; allow more time, or serve a smaller model"
    )


def _wanted(found: Mapping[Layout, Measured], most_workers: int, bound_ms: float) -> Iterator[Layout]:
    """Layouts that are worth trying, the most promising first; also such as have been tried."""
    yield default_layout(most_workers)
    yield from corners(most_workers)
    safe = [best for best in found.values() if best.is_safe(bound_ms)]
    if safe:
        yield from neighbours(max(safe, key=lambda best: best.requests_per_s).layout, most_workers, bound_ms)


def default_layout(cores: int) -> Layout:
    """TorchServe's own for a model that says nothing: a worker for each core, no batches."""
    return Layout(cores, BATCH_SIZE, BATCH_DELAY_MS)


def corners(most_workers: int) -> list[Layout]:
    """One worker with all cores and as many as there may be, with and without batches."""
    batches = [Layout(workers, _CORNER_BATCH_SIZE, _CORNER_DELAY_MS) for workers in (1, most_workers)]
    return [*batches, Layout(1, 1, BATCH_DELAY_MS)]


def other_threads(best: Measured, cores: int) -> list[Layout]:
    """The same with one thread, the worker's share of the cores and all cores, except what it took by itself."""
    if best.threads is None:
        return []
    share = max(1, cores // best.layout.workers)
    return [replace(best.layout, threads=threads) for threads in sorted({1, share, cores} - {best.threads})]


def neighbours(layout: Layout, most_workers: int, bound_ms: float) -> list[Layout]:
    """Layouts a step away: half and twice the batch, half and twice the workers, the next delays."""
    workers, batch_size, delay_ms = layout.workers, layout.batch_size, layout.max_batch_delay_ms
    batched = delay_ms if batch_size > 1 else _CORNER_DELAY_MS
    near = [Layout(workers, 2 * batch_size, batched)] if batch_size < _MOST_BATCH_SIZE else []
    if batch_size > 1:
        near.append(Layout(workers, batch_size // 2, batched if batch_size > 2 else BATCH_DELAY_MS))
        shorter = [delay for delay in _DELAYS_MS if delay < delay_ms]
        longer = [delay for delay in _DELAYS_MS if delay_ms < delay <= bound_ms / 2]
        near += [Layout(workers, batch_size, delay) for delay in (*shorter[-1:], *longer[:1])]
    near += [Layout(count, batch_size, delay_ms) for count in (workers // 2, 2 * workers) if 1 <= count <= most_workers]
    return near
