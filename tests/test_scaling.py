"""Workers up, down, to none and back while requests arrive, and the ceilings that stop it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from client import scaling
from client.errors import ClientError, NoWorkers, TooManyWorkers
from client.torchserve import TorchServe
from server.launch import RunningServer
from system.addresses import is_here
from tests.commands import command
from tests.conftest import MODEL, wait_for

MB = 1_000_000


@pytest.fixture
def scaled(client: TorchServe) -> Iterator[TorchServe]:
    """A client of the session's server, whose model has one worker before and after."""
    yield client
    client.scale(MODEL, 1)


class Load:
    """A prediction every 100 ms, whatever became of those before, until `end`."""

    def __init__(self, server: RunningServer, image: bytes, retry_s: float) -> None:
        address = (server.inference_url, server.management_url, server.key_file)
        self.client = TorchServe(*address, retry_s=retry_s, connections=64)
        self.image, self.answered, self.failures = image, 0, list[str]()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self.client.predict(MODEL, image)
        self._clock = self._pool.submit(self._tick)

    def _tick(self) -> None:
        while not self._stop.wait(0.1):
            self._pool.submit(self._ask)

    def _ask(self) -> None:
        try:
            self.client.predict(MODEL, self.image)
            self.answered += 1
        except ClientError as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    def wait_for_more(self, count: int) -> None:
        expected = self.answered + count
        wait_for(lambda: self.answered >= expected, f"{count} more answers", 60)

    def end(self) -> None:
        self._stop.set()
        self._clock.result()
        self._pool.shutdown()


@pytest.mark.slow
def test_scaling_under_load_costs_no_prediction(torchserve: RunningServer, scaled: TorchServe, digit: bytes) -> None:
    """1 → 2 → 1 → 0 → 1 workers while requests arrive: none fails that is asked again, and some that are not."""
    patient, hasty = Load(torchserve, digit, retry_s=60), Load(torchserve, digit, retry_s=0)
    try:
        for workers in (2, 1):
            scaled.scale(MODEL, workers)
            patient.wait_for_more(20)
        scaled.scale(MODEL, 0)
        wait_for(lambda: len(hasty.failures) >= 3, "requests that find no worker", 30)
        scaled.scale(MODEL, 1)
        patient.wait_for_more(20)
    finally:
        patient.end()
        hasty.end()
    assert patient.failures == []
    assert any("has no worker" in failure for failure in hasty.failures)


def test_waiting_for_a_worker_ends(scaled: TorchServe, torchserve: RunningServer, digit: bytes) -> None:
    """A model that has answered and stays without workers is an error when the time is up, with the way back."""
    client = TorchServe(torchserve.inference_url, torchserve.management_url, torchserve.key_file, retry_s=0.5)
    client.predict(MODEL, digit)
    scaled.scale(MODEL, 0)
    with pytest.raises(NoWorkers, match=f"python -m client scale {MODEL} 1"):
        client.predict(MODEL, digit)


def test_memory_is_a_ceiling(scaled: TorchServe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is measured by its process, or TorchServe tells; where no second one fits, it is refused by name."""
    description = scaled.describe(MODEL)
    [worker] = description["workers"]
    info = psutil.Process(worker["pid"]).memory_full_info()
    assert 10 * MB < info.uss < info.rss
    assert scaling.room_in_memory(description, 0.9 * info.uss) in (0, 1)
    assert scaling.room_in_memory(description, 0.5 * info.uss) == 0
    assert scaling.room_in_memory(description, 10.5 * info.uss) in range(8, 14)
    foreign = {"workers": [{**worker, "memoryUsage": 100 * MB, "pid": 1}]}
    assert scaling.room_in_memory(foreign, 250 * MB) == 2
    untold = {"workers": [{**worker, "memoryUsage": 0, "pid": 1}]}
    assert scaling.room_in_memory(untold, 0) is None

    free = psutil.virtual_memory()._replace(available=20 * MB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(scaling, "cores", lambda: 8)
    with pytest.raises(
        TooManyWorkers, match=r"2 workers would be more than 1, 20 MB of memory are free.*--ceiling 2 allows"
    ):
        scaling.check(scaled, MODEL, 2)
    with pytest.raises(TooManyWorkers, match="1 worker would be more than 0"):
        scaling.check(scaled, MODEL, 1, beside=True)
    assert scaling.most_workers(scaled, MODEL)[0] == 1
    assert scaling.most_workers(scaled, MODEL, beside=True)[0] == 0
    assert scaling.most_workers(scaled, "nobody") == (8, "this machine has no more cores")
    scaling.check(scaled, MODEL, 1)
    scaling.check(scaled, MODEL, 2, ceiling=2)


def test_the_command_refuses_and_scales(torchserve: RunningServer, scaled: TorchServe) -> None:
    """More than the cores and more than a given ceiling are refused in one line, and nothing has changed."""
    refused = command(torchserve, "scale", MODEL, "9999")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "this machine has no more cores: --ceiling 9999 allows them" in refused.stderr
    assert "the ceiling that was given" in command(torchserve, "scale", MODEL, "2", "--ceiling", "1").stderr
    assert scaled.ready_workers(MODEL) == 1
    assert command(torchserve, "scale", MODEL, "1", "--ceiling", "1").stdout == f"{MODEL}: 1 worker ready\n"


@pytest.mark.parametrize(
    ("url", "here"),
    [("http://127.0.0.1:8081", True), ("http://localhost:8081", True), ("http://[::1]:1", True),
     ("http://10.1.2.3:8081", False), ("http://models.example:8081", False)],
)  # fmt: skip
def test_another_machine_has_no_ceiling_of_ours(url: str, here: bool) -> None:
    """Its cores and memory are not these; a ceiling that is given counts all the same."""
    assert is_here(url) == here
    server = TorchServe("http://127.0.0.1:9", url)
    if not here:
        scaling.check(server, MODEL, 9999)
    with pytest.raises(TooManyWorkers):
        scaling.check(server, MODEL, 9999, ceiling=3)
