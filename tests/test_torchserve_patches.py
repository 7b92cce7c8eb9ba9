"""TorchServe as the handler patches it: installed once, and the same requests read in fewer system calls."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from types import ModuleType
from typing import Any

import pytest
from ts.protocol import otf_message_handler as patched
from ts.service import Service

from benchmarks.handler import as_sent  # with the handler, which patches TorchServe when it is imported
from handler import torchserve_patches


class CountingSocket(socket.socket):
    """Counts how often the system is asked for bytes."""

    calls = 0

    def recv(self, *arguments: Any) -> bytes:
        self.calls += 1
        return super().recv(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self.calls += 1
        return super().recv_into(*arguments)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, CountingSocket]]:
    """The frontend's end of a connection, and the worker's."""
    frontend, plain = socket.socketpair()
    worker = CountingSocket(fileno=plain.detach())
    worker.settimeout(None)
    with closing(frontend), closing(worker):
        yield frontend, worker


@pytest.fixture
def stock() -> ModuleType:
    """TorchServe's module as it comes."""
    spec = importlib.util.find_spec(patched.__name__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def received(connection: socket.socket, module: ModuleType, sent: bytes, worker: socket.socket, piece: int) -> Any:
    def send() -> None:
        for at in range(0, len(sent), piece):
            connection.sendall(sent[at : at + piece])

    sending = threading.Thread(target=send)
    sending.start()
    try:
        return module.retrieve_msg(worker)
    finally:
        sending.join()


def test_a_second_install_changes_nothing(monkeypatch: pytest.MonkeyPatch, stock: ModuleType) -> None:
    """Importing the handler has patched both functions; only one that is TorchServe's own again is patched anew."""
    before = (Service.retrieve_data_for_inference, patched._retrieve_buffer)
    torchserve_patches.install()
    assert (Service.retrieve_data_for_inference, patched._retrieve_buffer) == before
    monkeypatch.setattr(patched, "_retrieve_buffer", stock._retrieve_buffer)
    torchserve_patches.install()
    assert Service.retrieve_data_for_inference == before[0]
    assert patched._retrieve_buffer not in (before[1], stock._retrieve_buffer)


@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_requests_are_those_that_torchserve_reads(
    ends: tuple[socket.socket, CountingSocket], stock: ModuleType, piece: int
) -> None:
    """Whatever the pieces in which they come: empty bodies, and such as are longer than the buffer."""
    sent = as_sent([b"", b"PNG", bytes(range(256)) * 1000 if piece > 1 else b"x" * 300])
    theirs = received(ends[0], stock, sent, ends[1], piece)
    for _ in range(2):
        assert received(ends[0], patched, sent, ends[1], piece) == theirs
    assert len({bytes(request["requestId"]) for request in theirs[1]}) == 3


def test_a_request_takes_few_system_calls(ends: tuple[socket.socket, CountingSocket], stock: ModuleType) -> None:
    """Some twenty for each request in TorchServe's way; one for several requests in ours."""
    frontend, worker = ends
    sent = as_sent([b"PNG"] * 8)
    for module, fewest, most in ((stock, 150, 1000), (patched, 1, 8)):
        frontend.sendall(sent)
        before = worker.calls
        module.retrieve_msg(worker)
        assert fewest <= worker.calls - before <= most


def test_the_frontends_end_is_the_workers(ends: tuple[socket.socket, CountingSocket]) -> None:
    """In the middle of a message as between two."""
    frontend, worker = ends
    frontend.sendall(as_sent([b"PNG"])[:-6])
    frontend.shutdown(socket.SHUT_WR)
    with pytest.raises(SystemExit) as ended:
        patched.retrieve_msg(worker)
    assert ended.value.code == 0
