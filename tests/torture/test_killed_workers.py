"""Workers that are killed one after the other under load."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest

from client.torchserve import TorchServe
from operate.tuning.load import SUCCESS, load
from server.launch import RunningServer
from tests.conftest import MODEL, wait_for
from tests.observed import workers
from tests.torture.conftest import IS_LONG, Record

pytestmark = [pytest.mark.torture, pytest.mark.server, pytest.mark.slow]

KILLS, LOADS = (60, 9) if IS_LONG else (3, 3)
WORKERS = 2
BATCHES_AT_A_TIME = 4
"""Asked for at a time: one for each worker, and as many in the queue, which holds a hundred requests."""
EVERY_S = 5.0
HANDED_OVER_S = 1.0
"""After so long each of two workers that are stopped has been handed a whole batch."""
BEYOND_LOADING_S = 1.0
"""TorchServe waits as long before it starts another worker."""
# Three kills are few on a machine that may do other things as well.
TIMES_LOADING, FULL_SPEED_SHARE = (1, 0.9) if IS_LONG else (4, 0.5)
REPLACED_WITHIN_S = 120.0

Ends = list[tuple[float, str]]
"""When each request of a load ended, and how."""


@dataclass(frozen=True)
class Kill:
    """When one worker was killed, and when as many as before were ready."""

    killed_s: float
    back_s: float


@contextmanager
def loaded(server: RunningServer, image: bytes, each_s: float = 2) -> Iterator[Ends]:
    """Closed loops of `each_s`, one after the other and nothing asked twice, while something is done to the server."""
    ends: Ends = []
    concurrency = BATCHES_AT_A_TIME * server.client().describe(MODEL)["batchSize"]
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            started = time.perf_counter()
            result = load(server.client(), MODEL, [image], concurrency, each_s)
            ends.extend((started + row.due_s + row.latency_ms / 1e3, row.outcome) for row in result.answers)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield ends
        finally:
            is_over.set()
            working.result()


def is_whole(client: TorchServe, without: psutil.Process | None = None) -> bool:
    """Whether all workers are ready, and none of them is the one that was killed."""
    pids = {worker["pid"] for worker in client.describe(MODEL)["workers"] if worker["status"] == "READY"}
    return len({pid for pid in pids if psutil.pid_exists(pid)}) == WORKERS and (not without or without.pid not in pids)


def loading(client: TorchServe) -> float:
    """Seconds until a second worker is ready; it is let go of again."""
    began_s = time.perf_counter()
    client.scale(MODEL, WORKERS)
    wait_for(lambda: is_whole(client), "the second worker", REPLACED_WITHIN_S)
    seconds = time.perf_counter() - began_s
    client.scale(MODEL, 1)
    wait_for(lambda: len(client.describe(MODEL)["workers"]) == 1, "one worker", REPLACED_WITHIN_S)
    return seconds


def kill_one(client: TorchServe) -> Kill:
    """Kill a worker and wait until another has taken its place."""
    victim, killed_s = workers(client)[0], time.perf_counter()
    victim.kill()
    wait_for(lambda: is_whole(client, victim), "another worker", REPLACED_WITHIN_S)
    return Kill(killed_s, time.perf_counter())


def check_failures(ends: Ends, kills: list[Kill], batch_size: int) -> list[int]:
    """How many requests failed after each kill; no more than the killed worker had in its hands."""
    limits = [*(kill.killed_s for kill in kills), float("inf")]
    failed = [time_s for time_s, outcome in ends if outcome != SUCCESS]
    counts = [sum(start <= time_s < end for time_s in failed) for start, end in itertools.pairwise(limits)]
    assert sum(counts) == len(failed), "no request fails before the first kill"
    assert max(counts) <= batch_size, f"{counts} failed, at most {batch_size} are in one worker"
    return counts


def speed(ends: Ends, start_s: float, end_s: float) -> float:
    """Good answers a second in a part of a load."""
    return sum(start_s <= time_s < end_s for time_s, outcome in ends if outcome == SUCCESS) / (end_s - start_s)


def test_killed_workers(tortured: RunningServer, photograph: bytes, record: Record) -> None:
    """A killed worker takes its own rows along and no others; once another has loaded, all is as before."""
    client, kills = tortured.client(), list[Kill]()
    batch_size = client.describe(MODEL)["batchSize"]
    with loaded(tortured, photograph):
        loading_s = [loading(client) for _ in range(LOADS)]
    with loaded(tortured, photograph) as ends:
        client.scale(MODEL, WORKERS)
        wait_for(lambda: is_whole(client), "the second worker", REPLACED_WITHIN_S)
        whole_s = time.perf_counter()
        for _ in range(KILLS):
            threading.Event().wait(EVERY_S)
            kills.append(kill_one(client))
        threading.Event().wait(EVERY_S)
    client.scale(MODEL, 1)

    back_s = [kill.back_s - kill.killed_s for kill in kills]
    before = speed(ends, whole_s, kills[0].killed_s)
    ends_s = [*(kill.killed_s for kill in kills[1:]), kills[-1].back_s + EVERY_S]
    after = [speed(ends, kill.back_s, end_s) for kill, end_s in zip(kills, ends_s, strict=True)]
    record("batch size", batch_size)
    record("loading s", [round(value, 2) for value in loading_s])
    record("back s", [round(value, 2) for value in back_s])
    record("speed over that before", [round(value / before, 2) for value in after])
    record("failed a kill", check_failures(ends, kills, batch_size))
    assert statistics.median(back_s) <= TIMES_LOADING * statistics.median(loading_s) + BEYOND_LOADING_S
    assert (statistics.median if IS_LONG else max)(after) >= FULL_SPEED_SHARE * before


def test_lost_requests_show(tortured: RunningServer, photograph: bytes) -> None:
    """The control: both workers at once take more along than one has in its hands."""
    client = tortured.client()
    client.scale(MODEL, WORKERS)
    wait_for(lambda: is_whole(client), "the second worker", REPLACED_WITHIN_S)
    with loaded(tortured, photograph, 2 * EVERY_S) as ends:
        threading.Event().wait(EVERY_S)
        victims = workers(client)
        for victim in victims:
            victim.suspend()
        threading.Event().wait(HANDED_OVER_S)
        killed_s = time.perf_counter()
        for victim in victims:
            victim.kill()
    wait_for(lambda: is_whole(client), "both workers again", REPLACED_WITHIN_S)
    client.scale(MODEL, 1)
    with pytest.raises(AssertionError, match="are in one worker"):
        check_failures(ends, [Kill(killed_s, 0)], client.describe(MODEL)["batchSize"])
