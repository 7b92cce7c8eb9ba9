"""A readiness server whose clients take their time: none of them keeps a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import requests

from client.torchserve import TorchServe
from operate.readiness import probe
from operate.readiness.checks import ModelCheck
from operate.readiness.probe import ProbeServer
from tests.conftest import wait_for
from tests.edges import ended

HEAD_TIMEOUT_S = 1.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProbeServer]:
    """With less patience, and without a TorchServe, for which `/healthz` does not ask."""
    monkeypatch.setattr(probe, "HEAD_TIMEOUT_S", HEAD_TIMEOUT_S)
    monkeypatch.setattr(probe, "MOST_CONNECTIONS", 4)
    with ProbeServer(("127.0.0.1", 0), ModelCheck(TorchServe("http://127.0.0.1:9"), "nobody")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def connect(server: ProbeServer) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=30)
    connection.sendall(b"GET /healthz HTTP/1.1\r\n")
    return connection


def is_alive(server: ProbeServer) -> bool:
    return requests.get(f"http://127.0.0.1:{server.server_port}/healthz", timeout=10).ok


def drip(connection: socket.socket) -> bool:
    """Whether one more header could be sent."""
    try:
        connection.sendall(b"x: y\r\n")
        return True
    except OSError:
        return False


def test_a_head_that_drips_is_ended(server: ProbeServer) -> None:
    """Though each pause is short; without a limit for the whole it goes on."""
    with connect(server) as dripping:
        assert wait_for(lambda: not drip(dripping), "the end", 10) < HEAD_TIMEOUT_S + 3


def test_without_the_limit_it_goes_on(server: ProbeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the timeout of a single pause never comes."""
    monkeypatch.setattr(probe, "HEAD_TIMEOUT_S", 60.0)
    with connect(server) as dripping, pytest.raises(AssertionError, match="the end"):
        wait_for(lambda: not drip(dripping), "the end", 2 * HEAD_TIMEOUT_S)


def test_threads_are_bounded(server: ProbeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more connections than it may have the oldest ends, and a probe is answered meanwhile."""
    monkeypatch.setattr(probe, "HEAD_TIMEOUT_S", 60.0)
    before = threading.active_count()
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(20)]
        assert all(ended(connection) for connection in connections[:16])
        assert is_alive(server)
        wait_for(lambda: threading.active_count() <= before + 4, "threads have ended")
