"""A server in the foreground: it loses no request when it is stopped, comes back when it dies, and leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import processes
from server.supervise import MAX_FAILURES
from tests.conftest import MODEL, run_module, wait_for
from tests.supervised import START_TIMEOUT_S, STARTED_AGAIN_WITHIN_S, Supervised

pytestmark = pytest.mark.slow

CLIENTS = 6


@pytest.fixture
def supervised(model_store: Path, tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Starts servers of `model_store`, or of a copy of it, which are gone after the test."""
    started: list[Supervised] = []

    def start(name: str, *options: str, store: Path = model_store) -> Supervised:
        started.append(Supervised(tmp_path / name, store, *options))
        started[-1].wait_until_ready()
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        processes.stop(one.run_dir)


def test_stopping_under_load_loses_no_request(supervised: Callable[..., Supervised], digit: bytes) -> None:
    """SIGTERM while clients still have requests to send: every one is answered, then all is gone."""
    server = supervised("server", "--drain-timeout-s", "60")
    answered = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(server.load, digit, 150, answered) for _ in range(CLIENTS)]
        assert answered.wait(30)
        server.process.send_signal(signal.SIGTERM)
        server.wait(lambda: not server.ready.exists(), 5)
        assert not all(client.done() for client in clients), "there must be requests to lose"
        statuses = [client.result() for client in clients]
    assert statuses == [[200] * 150] * CLIENTS
    assert server.process.wait(60) == 0, server.output.read_text()
    assert "every request is answered" in server.output.read_text()
    assert server.leaves_nothing()


def test_java_alone_loses_requests_and_comes_back(
    supervised: Callable[..., Supervised], digit: bytes, request: pytest.FixtureRequest
) -> None:
    """The negative control: what TorchServe's own SIGTERM cuts. Then SIGKILL: both times it is brought back."""
    server = supervised("server", "--log-format", "json")
    serves_again_s: list[float] = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        java, workers = server.java(), processes.workers(server.run_dir)
        assert workers
        answered = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(server.load, digit, None, answered) for _ in range(CLIENTS)]
            assert answered.wait(30)
            killed_s = time.monotonic()
            java.send_signal(number)
            assert 0 in [client.result()[-1] for client in clients]
        server.wait(lambda java=java: not processes.is_alive(java))
        server.wait(lambda java=java: server.is_started_again(java), STARTED_AGAIN_WITHIN_S)
        server.wait_until_ready()
        assert not any(processes.is_alive(worker) for worker in workers)
        assert server.load(digit, 1, threading.Event()) == [200]
        serves_again_s.append(round(time.monotonic() - killed_s, 1))
    request.node.user_properties.append(("serves again s", json.dumps(serves_again_s)))  # for docs/reliability.md
    for log in ("ts_log.log", "model_log.log"):
        lines = (server.run_dir / "logs" / log).read_text().splitlines()
        assert lines
        assert all({"time", "level", "logger", "message"} < json.loads(line).keys() for line in lines)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.output.read_text()
    assert server.leaves_nothing()


def test_endless_load_is_refused_in_order(supervised: Callable[..., Supervised], digit: bytes) -> None:
    """Where requests go on after the drain time, new ones get 400 and none that was taken is lost."""
    server = supervised("server", "--drain-timeout-s", "1")
    answered = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(server.load, digit, None, answered) for _ in range(CLIENTS)]
        assert answered.wait(30)
        server.process.send_signal(signal.SIGTERM)
        statuses = [client.result() for client in clients]
    assert [(set(each[:-1]), each[-1]) for each in statuses] == [({200}, 400)] * CLIENTS
    assert server.process.wait(60) == 0, server.output.read_text()
    assert server.leaves_nothing()


def test_a_second_signal_ends_at_once(supervised: Callable[..., Supervised], digit: bytes) -> None:
    """Whoever cannot wait for the requests sends SIGTERM twice; nothing stays behind then either."""
    server = supervised("server", "--drain-timeout-s", "300")
    answered = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(server.load, digit, None, answered)
        assert answered.wait(30)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            server.wait(lambda: "stopping" in server.output.read_text(), 5)
        assert server.process.wait(60) == 0
        assert client.result()[-1] == 0
    assert "not every request could be answered" in server.output.read_text()
    assert server.leaves_nothing()


def test_the_ready_file_goes_with_the_last_worker(supervised: Callable[..., Supervised], digit: bytes) -> None:
    """Killed and kept from loading again, the only worker takes it along; TorchServe lives on, and so does the rest."""
    server = supervised("server")
    java = server.java()
    [weights] = processes.temp_dir(server.run_dir).rglob("model.pt")
    hidden = weights.rename(weights.with_suffix(".hidden"))
    for worker in processes.workers(server.run_dir):
        worker.kill()
    wait_for(lambda: not server.ready.exists(), "logs/ready is gone", 15)
    assert f"no longer ready: {MODEL}: 0 of 1 workers ready" in server.output.read_text()
    hidden.rename(weights)
    wait_for(server.ready.exists, "logs/ready is there again", START_TIMEOUT_S)
    assert "ready again" in server.output.read_text()
    assert server.load(digit, 1, threading.Event()) == [200]
    assert server.java() == java


def test_it_comes_back_beside_other_archives(
    supervised: Callable[..., Supervised], model_store: Path, tmp_path: Path, digit: bytes
) -> None:
    """What a rollout or a killed tuning has put into the store since the start is left out, and said."""
    store = Path(shutil.copytree(model_store, tmp_path / "store"))
    server = supervised("server", store=store)
    for other in (f"{MODEL}-2.0.mar", f"{MODEL}.tune-1-1-1.mar"):
        shutil.copy(store / f"{MODEL}.mar", store / other)
    java = server.java()
    java.kill()
    server.wait(lambda: server.is_started_again(java))
    server.wait_until_ready()
    assert server.load(digit, 1, threading.Event()) == [200]
    assert server.output.read_text().count(f"a start serves {MODEL}.mar of the model {MODEL}") == 2


def test_it_is_given_up_after_failures_in_a_row(
    supervised: Callable[..., Supervised], model_store: Path, tmp_path: Path
) -> None:
    """A server that cannot come back is not started for ever: the last reason is said, and the exit status is 1."""
    store = Path(shutil.copytree(model_store, tmp_path / "store"))
    server = supervised("server", store=store)
    (store / f"{MODEL}.mar").unlink()
    server.java().kill()
    assert server.process.wait(60) == 1
    assert f"gave up after {MAX_FAILURES} failures in a row, the last: no archive in" in server.output.read_text()
    assert "Traceback" not in server.output.read_text()
    assert server.leaves_nothing()


def test_two_side_by_side(supervised: Callable[..., Supervised], digit: bytes) -> None:
    """Two servers in two directories; `server stop` ends one, its watcher included, and the other goes on."""
    first, second = supervised("first"), supervised("second")
    for mode in ([], ["--foreground"]):
        again = run_module("server", "start", "--run-dir", first.run_dir, *mode)
        assert (again.returncode, again.stdout) == (1, "")
        assert "a server runs in" in again.stderr
        assert first.load(digit, 1, threading.Event()) == [200]
        assert (first.run_dir / "logs" / "ready").exists()
    stopped = run_module("server", "stop", "--run-dir", first.run_dir)
    assert "stopped the server" in stopped.stdout
    assert first.process.wait(5) == 0
    assert first.leaves_nothing()
    assert second.load(digit, 1, threading.Event()) == [200]
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(60) == 0
    assert second.leaves_nothing()
