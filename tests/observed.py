"""What a running server shows of itself: its metrics, once they stand still, and its workers."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from contextlib import suppress

import psutil
import requests

from client.metrics import read
from client.torchserve import TorchServe
from handler import metrics
from server.launch import RunningServer
from tests.conftest import MODEL


def scrape(torchserve: RunningServer) -> dict[str, dict[str, float]]:
    """Metric → labels as they are written → value, without a token."""
    answer = requests.get(f"{torchserve.metrics_url}/metrics", timeout=30)
    answer.raise_for_status()
    series: dict[str, dict[str, float]] = defaultdict(dict)
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", answer.text, flags=re.MULTILINE):
        series[name][labels] = float(value)
    return series


def of(values: dict[str, float], *labels: str) -> dict[str, float]:
    return {key: value for key, value in values.items() if all(label in key for label in labels)}


def totals(series: dict[str, dict[str, float]]) -> dict[str, float]:
    """The counters over all their labels."""
    return {name: sum(series[name].values()) for name in metrics.DECLARED["counter"]}


def settled(torchserve: RunningServer) -> dict[str, dict[str, float]]:
    """What /metrics says once no worker has more to tell: its counters stand still for longer than an interval."""
    deadline = time.monotonic() + 12 * metrics.INTERVAL_S
    series, still_since = scrape(torchserve), time.monotonic()
    while time.monotonic() < still_since + 1.2 * metrics.INTERVAL_S:
        assert time.monotonic() < deadline, f"other requests come in all the time: {totals(series)}"
        threading.Event().wait(0.2)
        if totals(latest := scrape(torchserve)) != totals(series):
            still_since = time.monotonic()
        series = latest
    return series


def reached(torchserve: RunningServer, wanted: dict[str, float]) -> dict[str, dict[str, float]]:
    """What /metrics says once the counters in `wanted`, which are told after all else, are that high."""
    deadline = time.monotonic() + 4 * metrics.INTERVAL_S
    while any(totals(series := scrape(torchserve))[name] < total for name, total in wanted.items()):
        assert time.monotonic() < deadline, f"counters stay below {wanted}: {totals(series)}"
        threading.Event().wait(0.1)
    return series


def workers(client: TorchServe) -> list[psutil.Process]:
    """The worker processes that are alive, by the pids of the description."""
    pids = [worker["pid"] for worker in client.describe(MODEL)["workers"]]
    found = []
    for pid in pids:
        with suppress(ValueError, psutil.NoSuchProcess):  # -1 before it is started
            found.append(psutil.Process(pid))
    return found


def requests_counted(server: RunningServer) -> float:
    samples = read(server.metrics_url)
    return sum(sample.value for sample in samples if sample.name == "ts_inference_requests_total")
