"""A server for a long time at 60 % of what it can, and at three times that."""

from __future__ import annotations

import time
from collections import defaultdict

import psutil
import pytest
from scipy import stats

from client.errors import ClientError
from client.torchserve import TorchServe
from operate.tuning.load import MAX_CONCURRENCY, SUCCESS, LoadResult, load
from server import processes
from server.launch import RunningServer
from tests.conftest import MODEL
from tests.torture.conftest import IS_LONG, Record, hasty

pytestmark = [pytest.mark.torture, pytest.mark.server, pytest.mark.slow]

SOAK_S = [600.0] * 3 if IS_LONG else [20.0]
OVERLOAD_S = 60 if IS_LONG else 5
SHARE_OF_PEAK, TIMES_PEAK = 0.6, 3
MOST_GROWTH = 0.02
WARM_UP_SHARE = 0.3
DEADLINE_S = 10.0
NORMAL_WITHIN_S = 5.0
CONNECTIONS = 32


def peak(server: RunningServer, image: bytes) -> float:
    """Requests a second of a closed loop, the best of three: the first also warms the server up."""
    return max(load(server.client(), MODEL, [image], duration_s=2).requests_per_s for _ in range(3))


class Memory:
    """The anonymous memory of each worker, looked at once a second.

    It counts pages that a worker shares with the process it was forked from, so writing to one is no growth.
    """

    def __init__(self, server: RunningServer) -> None:
        self.workers = processes.workers(server.key_file.parent)
        self.samples: dict[psutil.Process, list[tuple[float, int]]] = defaultdict(list)
        self._next = 0.0

    def watch(self, seconds: float, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 1
            for worker in self.workers:
                size = worker.memory_info()
                self.samples[worker].append((now, size.rss - size.shared))

    def growth(self) -> float:
        """Of the worker that grew most, after a warm-up: the share by which its memory rose along a robust line."""
        return max(map(_growth, self.samples.values()))


def _growth(samples: list[tuple[float, int]]) -> float:
    seconds, sizes = zip(*samples[int(WARM_UP_SHARE * len(samples)) :], strict=True)
    line = stats.theilslopes(sizes, seconds)
    return float(line.slope * (seconds[-1] - seconds[0]) / sizes[0])


def soak(server: RunningServer, image: bytes, rate: float, parts_s: list[float]) -> tuple[list[LoadResult], float]:
    """The results of an open loop, and by which share the memory of a worker grew."""
    memory = Memory(server)
    results = [
        load(server.client(), MODEL, [image], CONNECTIONS, part_s, rate, DEADLINE_S, watch=memory.watch)
        for part_s in parts_s
    ]
    return results, memory.growth()


def test_soak(tortured: RunningServer, photograph: bytes, record: Record) -> None:
    """At 60 % of its peak every request is answered, and no worker grows by more than 2 %."""
    rate = SHARE_OF_PEAK * peak(tortured, photograph)
    results, growth = soak(tortured, photograph, rate, SOAK_S)
    record("requests", sum(result.requests for result in results))
    record("not 200", sum(result.failed for result in results))
    record("requests/s", round(rate, 1))
    record("p99 ms", [round(result.latency_ms(0.99), 1) for result in results])
    record("growth %", round(100 * growth, 2))
    assert all(set(result.counts) == {SUCCESS} for result in results), [result.counts for result in results]
    assert growth <= MOST_GROWTH


def test_a_leak_shows(broken: RunningServer, photograph: bytes, record: Record) -> None:
    """The control to the soak: a handler that keeps what it is sent."""
    _, growth = soak(broken, photograph, SHARE_OF_PEAK * peak(broken, photograph), [10.0])
    record("growth of the leaky one %", round(100 * growth, 1))
    assert growth > MOST_GROWTH


def check_overload(result: LoadResult) -> None:
    """Every request was answered or refused at once, some refused: it was more than the server can."""
    assert set(result.counts) == {SUCCESS, "503"}, result.counts


def seconds_until_normal(server: RunningServer, image: bytes, normal_s: float) -> float:
    """Until five predictions in a row, each asked for once, take `normal_s` at most."""
    client, started = hasty(server), time.monotonic()
    in_a_row = 0
    while in_a_row < 5:
        assert time.monotonic() - started < 60, f"not within {normal_s} s a prediction after a minute"
        in_a_row = in_a_row + 1 if seconds(client, image) <= normal_s else 0
    return time.monotonic() - started


def seconds(client: TorchServe, image: bytes) -> float:
    """Of one prediction; infinite if it is refused."""
    started = time.monotonic()
    try:
        client.predict(MODEL, image)
    except ClientError:
        return float("inf")
    return time.monotonic() - started


def test_three_times_peak(tortured: RunningServer, photograph: bytes, record: Record) -> None:
    """Only 200 and 503, nothing that waits longer than its deadline, and a server as before within seconds."""
    normal_s = 3 * max(seconds(hasty(tortured), photograph) for _ in range(20))
    rate = TIMES_PEAK * peak(tortured, photograph)
    result = load(tortured.client(), MODEL, [photograph], MAX_CONCURRENCY, OVERLOAD_S, rate, DEADLINE_S)
    normal_again_s = seconds_until_normal(tortured, photograph, normal_s)
    record("asked requests/s", round(rate, 1))
    record("answers", result.counts)
    record("p99 ms", round(result.latency_ms(0.99)))
    record("normal again s", round(normal_again_s, 2))
    check_overload(result)
    assert normal_again_s <= NORMAL_WITHIN_S


def test_a_hanging_worker_shows(tortured: RunningServer, photograph: bytes) -> None:
    """The control to the overload: a worker that is stopped lets requests wait past their deadline."""
    workers = processes.workers(tortured.key_file.parent)
    for worker in workers:
        worker.suspend()
    try:
        result = load(tortured.client(), MODEL, [photograph], concurrency=8, duration_s=1, rate=20, deadline_s=0.5)
    finally:
        for worker in workers:
            worker.resume()
    with pytest.raises(AssertionError, match="timeout"):
        check_overload(result)
    seconds_until_normal(tortured, photograph, DEADLINE_S)
